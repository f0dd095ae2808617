"""Open-Sora 1.2, stage 2: STDiT3-XL/2 mostly on 360p and 480p, 2 to 16 seconds (23k steps when published).

Goes on from stage 1.

Hardware: GPUs with 80 GB. Model, optimizer and activations take about 38 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run opensora-v1-2/train/stage2 --data-path clips.csv --nproc 8
"""

dataset = dict(
    type="VariableVideoTextDataset",
    data_path=None,  # --data-path: a table with columns path, text, num_frames, height, width
    transform_name="resize_crop",
)

# resolution: {frames: (share of the fitting clips that is kept, batch size)}; longest clips and largest sizes are tried first
bucket_config = {
    "144p": {1: (1, 475), 51: (1, 51), 102: ((1, 0.33), 27), 204: ((1, 0.1), 13), 408: ((1, 0.1), 6)},
    "256": {1: (0.4, 297), 51: (0.5, 20), 102: ((0.5, 0.33), 10), 204: ((0.5, 1), 5), 408: ((0.5, 1), 2)},
    "240p": {1: (0.3, 297), 51: (0.4, 20), 102: ((0.4, 0.33), 10), 204: ((0.4, 1), 5), 408: ((0.4, 1), 2)},
    "360p": {1: (0.5, 141), 51: (0.15, 8), 102: ((0.3, 0.5), 4), 204: ((0.3, 1), 2), 408: ((0.5, 0.5), 1)},
    "512": {1: (0.4, 141), 51: (0.15, 8), 102: ((0.2, 0.4), 4), 204: ((0.2, 1), 2), 408: ((0.4, 0.5), 1)},
    "480p": {1: (0.5, 89), 51: (0.2, 5), 102: (0.2, 2), 204: (0.1, 1)},
    "720p": {1: (0.1, 36), 51: (0.03, 1)},
    "1024": {1: (0.1, 36), 51: (0.02, 1)},
    "1080p": {1: (0.01, 5)},
    "2048": {1: (0.01, 5)},
}

model = dict(
    type="STDiT3-XL/2",
    from_pretrained=None,  # --ckpt-path: a run folder, a file or a hub id
    qk_norm=True,
    freeze_y_embedder=True,
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
    random=0.05,
    intepolate=0.005,
    quarter_random=0.005,
    quarter_head=0.005,
    quarter_tail=0.005,
    quarter_head_tail=0.005,
    image_random=0.025,
    image_head=0.05,
    image_tail=0.025,
    image_head_tail=0.025,
)

grad_checkpoint = True
lr = 1e-4
grad_clip = 1.0
adam_eps = 1e-15
ema_decay = 0.99
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 8
log_every = 10
ckpt_every = 200
