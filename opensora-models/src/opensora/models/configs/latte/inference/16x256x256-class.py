"""Sample UCF101 action classes, 16 frames of 256x256, with the published Latte-XL/2.

Prompts are class numbers, 0 to 100.

Hardware: one GPU with 8 GB, or a CPU and patience: the model takes 1.3 GiB in bf16.
Command:  opensora-run latte/inference/16x256x256-class
"""

image_size = (256, 256)
num_frames = 16
fps = 8

model = dict(
    type="Latte-XL/2",
    condition="label_101",
    from_pretrained="Latte-XL-2-256x256-ucf101.pt",
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
)
text_encoder = dict(
    type="classes",
    num_classes=101,
)
scheduler = dict(
    type="dpm-solver",
    num_sampling_steps=20,
    cfg_scale=4,
)

prompt_path = "prompts/ucf101_id.txt"
batch_size = 2
seed = 42
dtype = "bf16"
