# GPT2-705M by the recipe of Teaching Tiny Minds (Table 1), a teacher of its ContrastiveLlama: 704,928,768
# parameters. config/gpt2_705m.py follows the text of Baby Llama; 4 epochs, batches of 128 and 300 warm-up
# steps are those of its published code.
#   torchrun --nproc_per_node=4 train.py config/tinyminds_gpt2_705m.py
out_dir = "out/tinyminds_gpt2_705m"

arch = "gpt2"
n_layer = 24
n_head = 16
n_embd = 1536
intermediate_size = 6144
tie_weights = True
norm_eps = 1e-5
dropout = 0.1

epochs = 4
batch_size = 128
micro_batch_size = 32  # fits 24 GB: 32; 80 GB: 128 (tools/plan.py)
learning_rate = 2.5e-4
warmup_iters = 300
weight_decay = 0.0
seq_len = 128
