"""From nothing to a text-to-video model: make captioned clips of moving digits, train on them, sample, grade.

Hardware: 2 CPU cores, no GPU, under 3 GB of memory.  Needs: all five packages.
Command:  opensora-run quickstart
Leaves:   mp4 files and contact-sheet.png in samples/, the loss plot, the checkpoint, and grade.json with the share of
          samples that show the digit and the direction of their prompt (chance: 10 % and 25 %).
"""

pipeline = "stages"
name = "quickstart"

_seed = 1024
_digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_directions = ["left", "right", "up", "down"]

_model = dict(
    type="STDiT3",
    hidden_size=256,
    depth=2,
    num_heads=4,
    patch_size=(4, 4, 4),  # 2 x 4 x 4 = 32 tokens a clip
    input_sq_size=512,
    pred_sigma=False,
    class_dropout_prob=0.1,
)
_scheduler = dict(
    type="rflow",
    num_sampling_steps=30,
    cfg_scale=4.0,
    sample_method="logit-normal",
    loc=1.7,  # most of what a caption decides is decided at high noise
)
_text_encoder = dict(type="hashed-words", width=64, model_max_length=8)

stages = dict(
    data=dict(
        pipeline="make-digits",
        save_dir="{run}/data",
        num_clips=2000,
        seed=_seed,
    ),
    train=dict(
        pipeline="train",
        run_folder="{run}/train",
        resume=True,
        ckpt_every=500,
        model=_model,
        scheduler=_scheduler,
        text_encoder=_text_encoder,
        dataset=dict(
            type="VideoTextDataset",
            data_path="{run}/data/clips.csv",
            num_frames=8,
            image_size=(16, 16),
            keep_in_memory=True,
        ),
        seed=_seed,
        mask_ratios=dict(  # some clips are trained with frames given, so that the model can also animate and extend
            image_head=0.25,
            quarter_head=0.15,
            image_tail=0.03,
            image_head_tail=0.03,
        ),
        batch_size=8,
        max_steps=5000,
        lr=2e-3,
        lr_schedule="cosine",
        warmup_steps=100,
        weight_decay=0.01,
        adam_betas=(0.9, 0.99),
        grad_clip=1.0,
        ema_decay=0.998,
        log_every=50,
        num_workers=0,
    ),
    sample=dict(
        pipeline="sample",
        save_dir="{run}/samples",
        skip_existing=True,
        model=dict(_model, from_pretrained="{run}/train"),
        scheduler=_scheduler,
        text_encoder=_text_encoder,
        prompt=[f"a handwritten {digit} moving {direction}" for digit in _digits for direction in _directions],
        num_sample=2,
        num_frames=8,
        image_size=(16, 16),
        fps=8,
        crf=4,
        seed=_seed,
        batch_size=40,
    ),
    grade=dict(
        pipeline="grade",
        samples="{run}/samples",
        held_out="{run}/data/held_out.csv",
    ),
)
