"""Train a PixArt-XL/2 on 64 frames, time scaled by 2/3.

The clips are 256x256, whatever the file's name says: so is it published.

Hardware: GPUs with 40 GB. Model, optimizer and activations take about 16 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run pixart/train/64x512x512 --data-path clips.csv --nproc 8
"""

dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # --data-path: a table with columns path and text
    num_frames=64,
    frame_interval=3,
    image_size=(256, 256),
)

model = dict(
    type="PixArt-XL/2",
    space_scale=1,
    time_scale=2 / 3,
    from_pretrained=None,  # --ckpt-path: a run folder, a file or a hub id
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
    micro_batch_size=128,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=120,
)
scheduler = dict(
    type="iddpm",
)

batch_size = 4
grad_checkpoint = True
lr = 2e-5
grad_clip = 1.0
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 4
log_every = 10
ckpt_every = 250
