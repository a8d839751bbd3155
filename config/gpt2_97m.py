# GPT2-97M (Teaching Tiny Minds, section 4): 97,540,608 parameters.
#   torchrun --nproc_per_node=4 train.py config/gpt2_97m.py
out_dir = "out/gpt2_97m"

arch = "gpt2"
n_layer = 12
n_head = 12
n_embd = 768
intermediate_size = 3072
tie_weights = True
norm_eps = 1e-5

epochs = 6
batch_size = 128
micro_batch_size = 32  # fits 24 GB: 128 (tools/plan.py)
learning_rate = 7e-4
warmup_iters = 300
weight_decay = 0.0
seq_len = 128
