"""Open-Sora 1.2, adaptation: teach STDiT3-XL/2 rectified flow and the video autoencoder, at 144p to 1080p.

Starts from image weights: --ckpt-path PixArt-Sigma-XL-2-2K-MS.pth.

Hardware: GPUs with 80 GB, at a smaller batch size or with grad_checkpoint: as it is, a step takes about 84 GiB
          (estimated, in bf16).
Command:  opensora-run opensora-v1-2/train/adapt --data-path clips.csv --nproc 8
"""

dataset = dict(
    type="VariableVideoTextDataset",
    data_path=None,  # --data-path: a table with columns path, text, num_frames, height, width
    transform_name="resize_crop",
)

# resolution: {frames: (share of the fitting clips that is kept, batch size)}; longest clips and largest sizes are tried first
bucket_config = {
    "144p": {1: (0.5, 48), 34: (1, 2), 51: (1, 4), 102: (1, 2), 204: (1, 1)},
    "256": {1: (0.6, 20), 34: (0.5, 2), 51: (0.5, 1), 68: (0.5, 1), 136: (0, None)},
    "240p": {1: (0.6, 20), 34: (0.5, 2), 51: (0.5, 1), 68: (0.5, 1), 136: (0, None)},
    "360p": {1: (0.5, 8), 34: (0.2, 1), 102: (0, None)},
    "512": {1: (0.5, 8), 34: (0.2, 1), 102: (0, None)},
    "480p": {1: (0.2, 4), 17: (0.3, 1), 68: (0, None)},
    "720p": {1: (0.1, 2)},
    "1024": {1: (0.1, 2)},
    "1080p": {1: (0.1, 1)},
}

model = dict(
    type="STDiT3-XL/2",
    from_pretrained=None,  # --ckpt-path: a run folder, a file or a hub id
    qk_norm=True,
)
vae = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="hpcai-tech/OpenSora-VAE-v1.2",
    micro_frame_size=17,
    micro_batch_size=4,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=300,
)
scheduler = dict(
    type="rflow",
    use_timestep_transform=True,
    sample_method="logit-normal",
)

# share of samples by which of their frames are given instead of noised; the rest is "identity": none
mask_ratios = dict(
    random=0.2,
    intepolate=0.01,
    quarter_random=0.01,
    quarter_head=0.01,
    quarter_tail=0.01,
    quarter_head_tail=0.01,
    image_random=0.05,
    image_head=0.1,
    image_tail=0.05,
    image_head_tail=0.05,
)

grad_checkpoint = False
lr = 1e-4
grad_clip = 1.0
adam_eps = 1e-15
ema_decay = 0.99
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 8
log_every = 10
ckpt_every = 500
