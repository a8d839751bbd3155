# A recipe for two CPU cores and about twenty minutes, laid over a model's config:
#   python train.py config/gpt2_10m.py config/cpu.py --out_dir=out/gpt2_10m
# 1,100 steps of 16 x 128 tokens: 2.25M tokens, an eighth of an epoch over 10M words, so no dropout.
batch_size = 16
max_iters = 1100
learning_rate = 1e-3
warmup_iters = 100
weight_decay = 0.1
dropout = 0.0
eval_interval = 550
eval_chunks = 1024
