"""Sample 16 frames of 256x256 from a caption with a Latte-XL/2 that latte/train/16x256x256.py has trained.

The caption reaches the model as one CLIP vector. There are no published weights of this model.

Hardware: one GPU with 8 GB, or a CPU and patience: the model takes 1.3 GiB in bf16.
Command:  opensora-run latte/inference/16x256x256
"""

image_size = (256, 256)
num_frames = 16
fps = 8

model = dict(
    type="Latte-XL/2",
    condition="text",
    from_pretrained=None,  # --ckpt-path: a run folder, a file or a hub id
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
)
text_encoder = dict(
    type="clip",
    from_pretrained="openai/clip-vit-base-patch32",
    model_max_length=77,
)
scheduler = dict(
    type="dpm-solver",
    num_sampling_steps=20,
    cfg_scale=4,
)

prompt_path = "prompts/ucf101_labels.txt"
batch_size = 2
seed = 42
dtype = "bf16"
