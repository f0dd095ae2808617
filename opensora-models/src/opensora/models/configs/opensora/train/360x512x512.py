"""STDiT-XL/2 on 360 frames of 512x512, each clip spread over two GPUs (sequence parallelism).

The accelerator zero2-seq is not built yet: this page composes (--dry-run), and says so when it is run.

Hardware: GPUs with 80 GB. Model, optimizer and activations take about 39 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run opensora/train/360x512x512 --data-path clips.csv --nproc 8
"""

dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # --data-path: a table with columns path and text
    num_frames=360,
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

accelerator = dict(type="zero2-seq", sp_size=2)

batch_size = 1
grad_checkpoint = True
lr = 2e-5
grad_clip = 1.0
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 4
log_every = 10
ckpt_every = 250
