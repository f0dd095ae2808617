"""Open-Sora 1.0 at 512x512: STDiT-XL/2 on 16 frames.

Goes on from 256x256: --ckpt-path OpenSora-v1-HQ-16x256x256.pth, say.

Hardware: GPUs with 40 GB. Model, optimizer and activations take about 23 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run opensora/train/16x512x512 --data-path clips.csv --nproc 8
"""

dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # --data-path: a table with columns path and text
    num_frames=16,
    frame_interval=3,
    image_size=(512, 512),
)

model = dict(
    type="STDiT-XL/2",
    space_scale=1,
    time_scale=1,
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

batch_size = 8
grad_checkpoint = True
lr = 2e-5
grad_clip = 1.0
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 4
log_every = 10
ckpt_every = 500
