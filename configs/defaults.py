"""The one configuration tree: every key, its default and what it means.

Precedence: the defaults here < the YAML file < the command line, flags and `--opts` alike.
"""

from __future__ import annotations

from yacs.config import CfgNode

_C = CfgNode()

# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------
_C.MODEL = CfgNode()
# Name of the model in reports and checkpoints
_C.MODEL.NAME = "quadmamba_small"
# Number of classes; 0 takes it from the data folder (1000 where there is no data)
_C.MODEL.NUM_CLASSES = 0
# Channels of the four stages
_C.MODEL.DIMS = [96, 192, 384, 768]
# Blocks in each stage
_C.MODEL.DEPTHS = [2, 2, 5, 2]
# Scan order of each stage: quadtree | release | raster | window
_C.MODEL.ORDERS = ["quadtree", "quadtree", "raster", "raster"]
# Side of a window of the `window` order, in tokens
_C.MODEL.WINDOW = 7
# Windows on a side of the grid outside and inside the selected quadrant, each 1 | 2 | 4 | 8 (1 only
# with `release`); [2, 2] switches the fine level off
_C.MODEL.PARTITION = [2, 4]
# Who selects the quadrant: predictor | random | first (always the top left one)
_C.MODEL.SELECTION = "predictor"
# Roll the grid in every second block of a quadtree or release stage
_C.MODEL.SHIFT = True
# Directions that the rolls take in turn, of (+, +), (-, -), (+, -), (-, +): 1 to 4
_C.MODEL.SHIFT_DIRECTIONS = 4
# Inner channels of the scan, as a multiple of the stage's channels
_C.MODEL.SSM_RATIO = 2.0
# State size of the scan for each channel (1 to 256)
_C.MODEL.D_STATE = 1
# Hidden channels of the MLP, as a multiple of the stage's channels
_C.MODEL.MLP_RATIO = 4.0
# Stochastic depth of the last block; it grows linearly from 0 over the blocks
_C.MODEL.DROP_PATH = 0.1
# Temperature of the Gumbel-softmax that chooses a quadrant in training
_C.MODEL.TAU = 1.0
# Gumbel noise in that choice; without it training takes the highest score, as evaluation does
_C.MODEL.GUMBEL = True
# Recompute each block in the backward pass instead of storing its activations
_C.MODEL.USE_CHECKPOINT = False

# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------
_C.DATA = CfgNode()
# Folder that holds train/ and val/, one sub-folder a class in each
_C.DATA.PATH = ""
# Side of the square training and validation crops, in pixels
_C.DATA.IMG_SIZE = 224
# Images per process and step
_C.DATA.BATCH_SIZE = 128
# Loader processes per rank; 0 reads in the main process, while it waits
_C.DATA.WORKERS = 8
# Seconds that the reading of one image may take before the run ends with its name. Keep it below
# RANK_TIMEOUT, so that the reason is told by the rank that has it
_C.DATA.TIMEOUT = 300.0
# Page-locked host memory for copies to the GPU
_C.DATA.PIN_MEMORY = True
# Resampling of resized images: bicubic | bilinear
_C.DATA.INTERPOLATION = "bicubic"
# Validation: resize to IMG_SIZE / CROP_RATIO, then crop the centre (224 / 0.875 = 256)
_C.DATA.CROP_RATIO = 0.875
# An unreadable image: raise (stop and name it) | skip (leave it out, count and report it)
_C.DATA.ON_ERROR = "raise"
# Most pixels of an image that is read, whatever its format; a worker needs up to 20 bytes for each
_C.DATA.MAX_PIXELS = 80_000_000

# ------------------------------------------------------------------------------------------------
# Augmentation (the DeiT recipe)
# ------------------------------------------------------------------------------------------------
_C.AUG = CfgNode()
# Area of the random resized crop, as fractions of the image
_C.AUG.SCALE = [0.08, 1.0]
# Probability of a horizontal flip
_C.AUG.HFLIP = 0.5
# Strength of colour jitter (used where AUTO_AUGMENT is empty)
_C.AUG.COLOR_JITTER = 0.4
# timm's RandAugment or AutoAugment policy; empty for none
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
# Probability of random erasing
_C.AUG.REPROB = 0.25
# Fill of an erased area: pixel (noise) | rand (one colour) | const (black)
_C.AUG.REMODE = "pixel"
# Mixup alpha, 0 for none
_C.AUG.MIXUP = 0.8
# CutMix alpha, 0 for none
_C.AUG.CUTMIX = 1.0
# Probability of Mixup or CutMix on a batch
_C.AUG.MIXUP_PROB = 1.0
# Probability of CutMix rather than Mixup where both are on
_C.AUG.MIXUP_SWITCH_PROB = 0.5

# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------
_C.TRAIN = CfgNode()
# Passes over the training set
_C.TRAIN.EPOCHS = 300
# Epochs of linear warm-up, counted in EPOCHS; where only EPOCHS is set and leaves it no room, the
# warm-up takes 20/300 of them
_C.TRAIN.WARMUP_EPOCHS = 20
# Learning rate for a total batch of LR_BATCH images
_C.TRAIN.BASE_LR = 5e-4
# Total batch to which BASE_LR, WARMUP_LR and MIN_LR belong; 0 switches linear scaling off
_C.TRAIN.LR_BATCH = 512
# Learning rate at the start of warm-up, scaled like BASE_LR
_C.TRAIN.WARMUP_LR = 5e-7
# Learning rate at the end of the cosine, scaled like BASE_LR
_C.TRAIN.MIN_LR = 5e-6
# AdamW: weight decay of matrices (biases, norms and the parameters of the scan have none)
_C.TRAIN.WEIGHT_DECAY = 0.05
# AdamW: decay rates of the two moment estimates
_C.TRAIN.BETAS = [0.9, 0.999]
# AdamW: term that keeps the denominator from zero
_C.TRAIN.EPS = 1e-8
# Also decay A_log and the bias of delta, as the official code does
_C.TRAIN.DECAY_SSM = False
# Largest gradient norm; 0 for no clipping
_C.TRAIN.CLIP_GRAD = 5.0
# Batches that make one optimizer step
_C.TRAIN.ACCUM_STEPS = 1
# Label smoothing
_C.TRAIN.LABEL_SMOOTHING = 0.1
# Autocast on the GPU: bf16 | fp16 | off (a CPU always computes in float32)
_C.TRAIN.AMP = "fp16"
# Keep an exponential moving average of the weights and evaluate it too
_C.TRAIN.EMA = True
# Decay of the average per optimizer step
_C.TRAIN.EMA_DECAY = 0.9999
# Optimizer steps in a row with a loss or gradient that is not finite before the run stops. They are
# skipped; with AMP fp16 a few of them are normal while the loss scale is found
_C.TRAIN.MAX_BAD_STEPS = 10
# How a step runs: off | graph (its passes as one CUDA graph on each GPU, gradients averaged after
# it), or as torch.compile makes them: default | reduce-overhead | max-autotune
_C.TRAIN.COMPILE = "off"
# Batch norms, where a model has any, take their statistics over all ranks (on GPUs only)
_C.TRAIN.SYNC_BN = False
# Epochs between two checkpoints
_C.TRAIN.SAVE_EVERY = 1
# Minutes between two checkpoints inside an epoch; 0 for none
_C.TRAIN.SAVE_MINUTES = 10.0
# Last checkpoints that are kept: last.pth, last.1.pth, ...
_C.TRAIN.KEEP = 2
# Epochs between two validations
_C.TRAIN.EVAL_EVERY = 1
# Continue from the last checkpoint in the output folder, if there is one
_C.TRAIN.AUTO_RESUME = True
# Checkpoint to continue from: weights, optimizer, schedule and place in the epoch (goes before
# AUTO_RESUME)
_C.TRAIN.RESUME = ""
# Weights to start from, or to evaluate
_C.TRAIN.PRETRAINED = ""
# Seed of every random generator; in a step it is joined by the epoch, the step and the rank
_C.TRAIN.SEED = 0

# ------------------------------------------------------------------------------------------------
# Run
# ------------------------------------------------------------------------------------------------
# What to do: train | eval | throughput | info
_C.MODE = "train"
# auto (the GPU if there is one) | cpu | cuda
_C.DEVICE = "auto"
# Minutes that ranks wait for one another before the run ends, from the start on
_C.RANK_TIMEOUT = 10.0
# Folder for results; a run writes to OUTPUT/MODEL.NAME/TAG. All paths may hold ~ and $VAR
_C.OUTPUT = "output"
# Name of the run, and of its folder
_C.TAG = "default"
# Optimizer steps between two log lines
_C.LOG_EVERY = 10
# Validation images whose score maps and partitions go to TensorBoard, 0 for none
_C.LOG_IMAGES = 4
# Epochs between two such pictures, taken at a validation (the last one always is)
_C.LOG_IMAGES_EVERY = 10
