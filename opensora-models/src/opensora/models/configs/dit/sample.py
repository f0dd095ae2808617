"""Sample ImageNet classes with the published DiT-XL/2 at 256x256.

The weights are https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt: download them once, and give the file. The same
config samples from a run of dit/train.py.

Hardware: one GPU with 8 GB, or a CPU and patience.
Command:  opensora-run dit/sample.py --ckpt-path DiT-XL-2-256x256.pt --prompt 207 88
"""

image_size = (256, 256)
num_frames = 1
fps = 1

model = dict(
    type="DiT-XL/2",
    from_pretrained="DiT-XL-2-256x256.pt",
    condition="label_1000",
    no_temporal_pos_emb=True,
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
    type="iddpm",
    num_sampling_steps=100,
    cfg_scale=4.0,
)

# Golden retriever, otter, red panda, geyser, macaw, valley, balloon, arctic fox.
prompt = ["207", "360", "387", "974", "88", "979", "417", "279"]
batch_size = 2
seed = 42
dtype = "bf16"
