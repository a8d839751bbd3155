# Llama-360M, a teacher of Baby Llama (section 2): 359,973,888 parameters.
#   torchrun --nproc_per_node=4 train.py config/llama_360m.py
# The paper's run took about 2 hours on one RTX 3090. Paper: 200 warm-up steps, chunks of 256, as here;
# the published code: 300 steps, chunks of 128, each shifted by a random offset (random_offset = True).
out_dir = "out/llama_360m"

arch = "llama"
n_layer = 24
n_head = 8
n_embd = 1024
intermediate_size = 3072

epochs = 4
batch_size = 128
micro_batch_size = 32  # fits 24 GB: 32; 80 GB: 128 (tools/plan.py)
learning_rate = 3e-4
warmup_iters = 200
weight_decay = 0.0
seq_len = 256
