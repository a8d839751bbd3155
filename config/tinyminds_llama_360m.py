# Llama-360M by the recipe of Teaching Tiny Minds (Table 1), a teacher of its ContrastiveLlama: 359,973,888
# parameters. config/llama_360m.py follows Baby Llama's text; 300 warm-up steps (the table) and chunks of 128
# (section 2) are Tiny Minds'.
#   torchrun --nproc_per_node=4 train.py config/tinyminds_llama_360m.py
out_dir = "out/tinyminds_llama_360m"

arch = "llama"
n_layer = 24
n_head = 8
n_embd = 1024
intermediate_size = 3072

epochs = 4
batch_size = 128
micro_batch_size = 32  # fits 24 GB: 64; 80 GB: 128 (tools/plan.py)
learning_rate = 3e-4
warmup_iters = 300
weight_decay = 0.0
seq_len = 128
