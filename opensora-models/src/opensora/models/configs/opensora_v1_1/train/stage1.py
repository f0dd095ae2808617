"""Open-Sora 1.1, stage 1: STDiT2-XL/2 on clips of 144p and 256, up to 96 frames, and images up to 1024.

Starts from image weights: --ckpt-path PixArt-XL-2-512x512.pth. A quarter of the samples is given some
frames, so that the model learns to animate and extend.

Hardware: GPUs with 80 GB. Model, optimizer and activations take about 57 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run opensora-v1-1/train/stage1 --data-path clips.csv --nproc 8
"""

dataset = dict(
    type="VariableVideoTextDataset",
    data_path=None,  # --data-path: a table with columns path, text, num_frames, height, width
    frame_interval=3,
    transform_name="resize_crop",
)

# resolution: {frames: (share of the fitting clips that is kept, batch size)}; longest clips and largest sizes are tried first
bucket_config = {
    "144p": {1: (0.5, 48), 16: (1, 6), 32: (1, 3), 96: (1, 1)},
    "256": {1: (0.5, 24), 16: (0.5, 3), 48: (0.5, 1), 64: (0, None)},
    "240p": {16: (0.3, 2), 32: (0.3, 1), 64: (0, None)},
    "512": {1: (0.4, 12)},
    "1024": {1: (0.3, 3)},
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

grad_checkpoint = False
lr = 2e-5
grad_clip = 1.0
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 8
log_every = 10
ckpt_every = 500
