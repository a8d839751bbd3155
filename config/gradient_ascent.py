# Gradient ascent post-training (Baby Llama, appendix B, after Yoon et al. 2023): 15 to 100 steps up the loss,
# one chunk at a time. best.json names the least loss of steps 5, 10 and 15, last.json the last step.
#   python train.py config/gpt2_10m.py config/gradient_ascent.py --init_from=out/gpt2_10m \
#       --out_dir=out/gpt2_10m_ascent
ascent = True
batch_size = 1
micro_batch_size = 0
max_iters = 15
learning_rate = 5e-5
warmup_iters = 0
schedule = "constant"
weight_decay = 0.0
eval_interval = 5
