"""Open-Sora 1.1, stage 3: STDiT2-XL/2 mostly on 480p and 720p, up to 128 frames, and images up to 1024.

Goes on from stage 2.

Hardware: GPUs with 48 GB. Model, optimizer and activations take about 26 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run opensora-v1-1/train/stage3 --data-path clips.csv --nproc 8
"""

dataset = dict(
    type="VariableVideoTextDataset",
    data_path=None,  # --data-path: a table with columns path, text, num_frames, height, width
    frame_interval=3,
    transform_name="resize_crop",
)

# resolution: {frames: (share of the fitting clips that is kept, batch size)}; longest clips and largest sizes are tried first
bucket_config = {
    "144p": {1: (1, 200), 16: (1, 36), 32: (1, 18), 64: (1, 9), 128: (1, 4)},
    "256": {1: (0.8, 200), 16: (0.5, 22), 32: (0.5, 11), 64: (0.5, 6), 128: (0.8, 4)},
    "240p": {1: (0.8, 200), 16: (0.5, 22), 32: (0.5, 10), 64: (0.5, 6), 128: (0.5, 3)},
    "360p": {1: (0.5, 120), 16: (0.5, 9), 32: (0.5, 4), 64: (0.5, 2), 128: (0.5, 1)},
    "512": {1: (0.5, 120), 16: (0.5, 9), 32: (0.5, 4), 64: (0.5, 2), 128: (0.8, 1)},
    "480p": {1: (0.4, 80), 16: (0.6, 6), 32: (0.6, 3), 64: (0.6, 1), 128: (0, None)},
    "720p": {1: (0.4, 40), 16: (0.6, 3), 32: (0.6, 1), 96: (0, None)},
    "1024": {1: (0.3, 40)},
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
