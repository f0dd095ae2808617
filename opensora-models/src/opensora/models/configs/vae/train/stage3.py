"""The video autoencoder of Open-Sora 1.2, stage 3: 1 to 33 frames at a time, and the loss on pixels.

Goes on from stage 2 (540k steps on 24 GPUs when published).

Hardware: GPUs with 24 GB.
Command:  opensora-run vae/train/stage3 --data-path clips.csv --nproc 8
"""

pipeline = "train-vae"

dataset = dict(
    type="VideoTextDataset",
    data_path=None,  # --data-path: a table with a column path
    num_frames=33,
    frame_interval=1,
    image_size=(256, 256),
)

model = dict(
    type="VideoAutoencoderPipeline",
    freeze_vae_2d=False,
    from_pretrained=None,  # --ckpt-path: the run folder of the stage before
    cal_loss=True,
    vae_2d=dict(
        type="VideoAutoencoderKL", from_pretrained="PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", subfolder="vae"
    ),
    vae_temporal=dict(type="VAE_Temporal_SD", from_pretrained=None),
)

perceptual_loss_weight = 0.1
kl_loss_weight = 1e-6
mixed_strategy = "mixed_video_random"
use_real_rec_loss = True
use_z_rec_loss = False
use_image_identity_loss = False
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
