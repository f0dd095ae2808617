"""Train STDiT-XL/2 on 16 frames of 256x256, some of them given, starting from PixArt-alpha's image weights.

30 % of the samples have given frames, so that the model learns to animate and extend. (Open-Sora's file has mask names that
its code refuses; these are today's.)

Hardware: GPUs with 40 GB. Model, optimizer and activations take about 16 GiB (estimated, in bf16), T5 9 GiB.
Command:  opensora-run opensora/train/16x256x256-mask --data-path clips.csv --nproc 8
"""

dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # --data-path: a table with columns path and text
    num_frames=16,
    frame_interval=3,
    image_size=(256, 256),
)

model = dict(
    type="STDiT-XL/2",
    space_scale=0.5,
    time_scale=1,
    from_pretrained="PixArt-XL-2-512x512.pth",
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=120,
)
scheduler = dict(
    type="iddpm",
)

# share of samples by which of their frames are given instead of noised; the rest is "identity": none
mask_ratios = dict(
    identity=0.7,
    random=0.15,
    quarter_head=0.05,
    quarter_tail=0.05,
    quarter_head_tail=0.05,
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
ckpt_every = 1000
