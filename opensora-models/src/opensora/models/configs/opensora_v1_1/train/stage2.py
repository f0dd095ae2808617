"""Open-Sora 1.1, stage 2: STDiT2-XL/2 mostly on 240p, up to 128 frames, and images up to 1080p.

Goes on from stage 1.

Hardware: GPUs with 40 GB. Model, optimizer and activations take about 22 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run opensora-v1-1/train/stage2 --data-path clips.csv --nproc 8
"""

dataset = dict(
    type="VariableVideoTextDataset",
    data_path=None,  # --data-path: a table with columns path, text, num_frames, height, width
    frame_interval=3,
    transform_name="resize_crop",
)

# resolution: {frames: (share of the fitting clips that is kept, batch size)}; longest clips and largest sizes are tried first
bucket_config = {
    "144p": {1: (1, 48), 16: (1, 17), 32: (1, 9), 64: (1, 4), 128: (1, 1)},
    "256": {1: (0.8, 254), 16: (0.5, 17), 32: (0.5, 9), 64: (0.5, 4), 128: (0.5, 1)},
    "240p": {1: (0.1, 20), 16: (0.9, 17), 32: (0.8, 9), 64: (0.8, 4), 128: (0.8, 2)},
    "512": {1: (0.5, 86), 16: (0.2, 4), 32: (0.2, 2), 64: (0.2, 1), 128: (0, None)},
    "480p": {1: (0.4, 54), 16: (0.4, 4), 32: (0, None)},
    "720p": {1: (0.1, 20), 16: (0.1, 2), 32: (0, None)},
    "1024": {1: (0.3, 20)},
    "1080p": {1: (0.4, 8)},
}

model = dict(
    type="STDiT2-XL/2",
    from_pretrained=None,  # --ckpt-path: a run folder, a file or a hub id
    input_sq_size=512,
    qk_norm=True,
    qk_norm_legacy=True,
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
    micro_batch_size=4,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=200,
)
scheduler = dict(
    type="iddpm",
)

# share of samples by which of their frames are given instead of noised; the rest is "identity": none
mask_ratios = dict(
    identity=0.75,
    quarter_random=0.025,
    quarter_head=0.025,
    quarter_tail=0.025,
    quarter_head_tail=0.05,
    image_random=0.025,
    image_head=0.025,
    image_tail=0.025,
    image_head_tail=0.05,
)

grad_checkpoint = True
lr = 2e-5
grad_clip = 1.0
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 8
log_every = 10
ckpt_every = 500
