"""Open-Sora 1.2, stage 1 from features that were computed ahead: files of latents and embeddings instead of clips.

The folder has .safetensors files, or .bin files of Open-Sora's own extraction; those with projected captions
(save_compressed_text_features) need model.skip_y_embedder = True. To train on clips whose features are found or computed
by themselves use opensora-v1-2/train/stage1 with features = dict(folder="features").

Hardware: GPUs with 80 GB. Model, optimizer and averages take about 18 GiB (estimated); no autoencoder and no T5 is loaded.
Command:  opensora-run opensora-v1-2/train/stage1_feat --data-path FOLDER --nproc 8
"""

dataset = dict(
    type="FeatureDataset",
    data_path=None,  # --data-path: a folder of files with latents and embeddings
    latent_channels=4,
    text_width=4096,
    text_length=300,
)

model = dict(
    type="STDiT3-XL/2",
    from_pretrained=None,  # --ckpt-path: a run folder, a file or a hub id
    qk_norm=True,
    freeze_y_embedder=True,
)
scheduler = dict(
    type="rflow",
    use_timestep_transform=True,
    sample_method="logit-normal",
)

# share of samples by which of their frames are given instead of noised; the rest is "identity": none
mask_ratios = dict(
    random=0.2,
    intepolate=0.01,
    quarter_random=0.01,
    quarter_head=0.01,
    quarter_tail=0.01,
    quarter_head_tail=0.01,
    image_random=0.05,
    image_head=0.1,
    image_tail=0.05,
    image_head_tail=0.05,
)

grad_checkpoint = True
batch_size = 8
lr = 2e-4
grad_clip = 1.0
adam_eps = 1e-15
ema_decay = 0.99
epochs = 1000
seed = 42
dtype = "bf16"
num_workers = 4
log_every = 10
ckpt_every = 500
