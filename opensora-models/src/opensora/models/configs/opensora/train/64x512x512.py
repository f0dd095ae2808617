"""Open-Sora 1.0 at 64 frames of 512x512: STDiT-XL/2 with time scaled by 2/3.

Goes on from 16 frames: --ckpt-path OpenSora-v1-HQ-16x512x512.pth, say.

Hardware: GPUs with 48 GB. Model, optimizer and activations take about 32 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run opensora/train/64x512x512 --data-path clips.csv --nproc 8
"""

dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # --data-path: a table with columns path and text
    num_frames=64,
    frame_interval=3,
    image_size=(512, 512),
)

model = dict(
    type="STDiT-XL/2",
    space_scale=1,
    time_scale=2 / 3,
    from_pretrained=None,  # --ckpt-path: a run folder, a file or a hub id
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
    micro_batch_size=64,
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
