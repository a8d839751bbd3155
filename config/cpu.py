# A recipe for about twenty minutes on two CPU cores, laid over a model's config:
#   python train.py config/gpt2_10m.py config/cpu.py --out_dir=out/gpt2_10m
# 1,000 steps of 8 x 128 tokens: 1.02M tokens, a sixteenth of an epoch over 10M words, so no dropout.
batch_size = 8
micro_batch_size = 0
max_iters = 1000
learning_rate = 1e-3
warmup_iters = 100
weight_decay = 0.1
dropout = 0.0
eval_interval = 500
eval_chunks = 1024
log_interval = 20
