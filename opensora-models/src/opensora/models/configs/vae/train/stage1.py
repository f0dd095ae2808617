"""The video autoencoder of Open-Sora 1.2, stage 1: the temporal part learns to rebuild the latents of a frozen image VAE.

A fifth of the samples are single images, whose latents are to stay as they are (380k steps on 8 GPUs when published).

Hardware: GPUs with 24 GB. Weights, optimizer and activations take about 6 GiB (estimated).
Command:  opensora-run vae/train/stage1 --data-path clips.csv --nproc 8
"""

pipeline = "train-vae"

dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # --data-path: a table with a column path
    num_frames=17,
    frame_interval=1,
    image_size=(256, 256),
)

model = dict(
    type="VideoAutoencoderPipeline",
    freeze_vae_2d=True,
    from_pretrained=None,
    cal_loss=True,
    vae_2d=dict(
        type="VideoAutoencoderKL", from_pretrained="PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", subfolder="vae"
    ),
    vae_temporal=dict(type="VAE_Temporal_SD", from_pretrained=None),
)

perceptual_loss_weight = 0.1
kl_loss_weight = 1e-6
mixed_strategy = "mixed_video_image"
mixed_image_ratio = 0.2
use_real_rec_loss = False
use_z_rec_loss = True
use_image_identity_loss = True
batch_size = 1
grad_checkpoint = True
lr = 1e-5
grad_clip = 1.0
epochs = 100
seed = 42
dtype = "bf16"
num_workers = 16
log_every = 1
ckpt_every = 1000
