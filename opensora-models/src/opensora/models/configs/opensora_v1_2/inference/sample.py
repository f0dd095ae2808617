"""Sample 2 seconds of 240p landscape with Open-Sora 1.2's published STDiT3-XL/2.

Weights, autoencoder and text encoder are downloaded when they are first used.

Hardware: one GPU with 16 GB: T5 takes 9 GiB in bf16 and is released once the prompts are encoded, the model 2.2 GiB.
Command:  opensora-run opensora-v1-2/inference/sample
"""

resolution = "240p"
aspect_ratio = "9:16"
num_frames = 51
fps = 24
frame_interval = 1
save_fps = 24

model = dict(
    type="STDiT3-XL/2",
    from_pretrained="hpcai-tech/OpenSora-STDiT-v3",
    qk_norm=True,
)
vae = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="hpcai-tech/OpenSora-VAE-v1.2",
    micro_frame_size=17,
    micro_batch_size=4,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=300,
)
scheduler = dict(
    type="rflow",
    use_timestep_transform=True,
    num_sampling_steps=30,
    cfg_scale=7,
)

prompt_path = "prompts/t2v_samples.txt"
aes = 6.5  # adds "aesthetic score: 6.5." to the prompt, as in the training captions
batch_size = 1
seed = 42
dtype = "bf16"
