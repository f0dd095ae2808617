"""Train STDiT2-XL/2 on captioned images of all sizes from 256 to 1080p.

Start from PixArt-alpha with --ckpt-path PixArt-XL-2-512x512.pth.

Hardware: GPUs with 40 GB. Model, optimizer and activations take about 20 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run opensora-v1-1/train/image --data-path images.csv --nproc 8
"""

dataset = dict(
    type="VariableVideoTextDataset",
    data_path=None,  # --data-path: a table with columns path, text, num_frames, height, width
    frame_interval=3,
    transform_name="resize_crop",
)

# resolution: {frames: (share of the fitting clips that is kept, batch size)}; longest clips and largest sizes are tried first
bucket_config = {
    "256": {1: (1, 256)},
    "512": {1: (1, 80)},
    "480p": {1: (1, 52)},
    "1024": {1: (1, 20)},
    "1080p": {1: (1, 8)},
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

grad_checkpoint = True
lr = 2e-5
grad_clip = 1.0
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 4
log_every = 10
ckpt_every = 500
