"""Train a DiT-XL/2 on the classes of ImageNet at 256x256, as its paper did.

Hardware: GPUs with 80 GB at this batch size. The paper took 7 million steps of 256 images (FID 9.6, with guidance 2.3).
Command:  opensora-run dit/train.py --data-path imagenet/train --nproc 2
"""

dataset = dict(
    type="ClassImages",
    data_path="imagenet/train",  # a folder a class
    image_size=(256, 256),
    transform_name="center",
)

model = dict(
    type="DiT-XL/2",
    from_pretrained=None,
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
scheduler = dict(type="iddpm")

batch_size = 128
lr = 1e-4
grad_clip = 1.0
ema_decay = 0.9999
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 4
log_every = 10
ckpt_every = 1000
