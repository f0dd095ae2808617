"""Animate, connect and edit with Open-Sora 1.1: references in the prompts, two rounds of 16 frames at 240p.

Prompts end in JSON with the files to start from and where their frames go. Bring these files, cat.png and the others, or
write prompts of your own: docs/prompts.md.

Hardware: one GPU with 16 GB: T5 takes 9 GiB in bf16 and is released once the prompts are encoded, the model 1.4 GiB.
Command:  opensora-run opensora-v1-1/inference/sample-ref
"""

image_size = (240, 426)
num_frames = 16
fps = 24
frame_interval = 3
loop = 2
condition_frame_length = 4

model = dict(
    type="STDiT2-XL/2",
    from_pretrained="hpcai-tech/OpenSora-STDiT-v2-stage3",
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
    num_sampling_steps=100,
    cfg_scale=7,
    cfg_channel=3,
)

prompt = [
    'A cat on a windowsill turns its head to the rain. {"reference_path": "cat.png", "mask_strategy": "0"}',
    'A river runs through a valley in autumn. {"reference_path": "river.mp4", "mask_strategy": "0,0,-8,0,8"}',
    'Snow falls on a quiet street. {"reference_path": "street.mp4", "mask_strategy": "0,0,0,0,8,0.3"}',
    "Waves roll onto a beach of black sand, seen from above.",
    'A seed becomes a flower, time lapse. {"reference_path": "seed.png;flower.png", "mask_strategy": "0;0,1,0,-1,1"}',
    "A tram climbs a steep street in the morning sun.",
]
batch_size = 1
seed = 42
dtype = "bf16"
