"""Sample 16 frames of 240p landscape with Open-Sora 1.1's published STDiT2-XL/2, stage 3.

The weights need the order of norm and rotation of 1.1: qk_norm_legacy.

Hardware: one GPU with 16 GB: T5 takes 9 GiB in bf16 and is released once the prompts are encoded, the model 1.4 GiB.
Command:  opensora-run opensora-v1-1/inference/sample
"""

image_size = (240, 426)
num_frames = 16
fps = 24
frame_interval = 3

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

prompt_path = "prompts/t2v_samples.txt"
batch_size = 1
seed = 42
dtype = "bf16"
