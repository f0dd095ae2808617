"""Sample ImageNet classes at 256x256 with the published DiT-XL/2.

Prompts are class numbers, 0 to 999.

Hardware: one GPU with 8 GB, or a CPU and patience: the model takes 1.3 GiB in bf16.
Command:  opensora-run dit/inference/1x256x256-class
"""

image_size = (256, 256)
num_frames = 1
fps = 1

model = dict(
    type="DiT-XL/2",
    no_temporal_pos_emb=True,
    condition="label_1000",
    from_pretrained="DiT-XL-2-256x256.pt",
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
)
text_encoder = dict(
    type="classes",
    num_classes=1000,
)
scheduler = dict(
    type="dpm-solver",
    num_sampling_steps=20,
    cfg_scale=4,
)

prompt_path = "prompts/imagenet_id.txt"
batch_size = 2
seed = 42
dtype = "bf16"
