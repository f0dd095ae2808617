"""Train STDiT2-XL/2 mostly on videos of 240p, up to 128 frames, with images of 256 to 1080p.

No frame masks: text to video alone.

Hardware: GPUs with 40 GB. Model, optimizer and activations take about 22 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run opensora-v1-1/train/video --data-path clips.csv --nproc 8
"""

dataset = dict(
    type="VariableVideoTextDataset",
    data_path=None,  # --data-path: a table with columns path, text, num_frames, height, width
    frame_interval=3,
    transform_name="resize_crop",
)

# resolution: {frames: (share of the fitting clips that is kept, batch size)}; longest clips and largest sizes are tried first
bucket_config = {
    "240p": {16: (1, 16), 32: (1, 8), 64: (1, 4), 128: (1, 2)},
    "256": {1: (1, 256)},
    "512": {1: (0.5, 80)},
    "480p": {1: (0.4, 52), 16: (0.4, 4), 32: (0, None)},
    "720p": {16: (0.1, 2), 32: (0, None)},
    "1024": {1: (0.3, 20)},
    "1080p": {1: (0.3, 8)},
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
