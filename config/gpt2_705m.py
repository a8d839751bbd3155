# GPT2-705M, a teacher of Baby Llama (section 2): 704,928,768 parameters.
#   torchrun --nproc_per_node=4 train.py config/gpt2_705m.py
# The paper's run took about 12 hours on one RTX 3090. Paper: 6 epochs, batches of 256, 200 warm-up steps, as
# here; the published code: 4 epochs, 128, 300, and random offsets.
out_dir = "out/gpt2_705m"

arch = "gpt2"
n_layer = 24
n_head = 16
n_embd = 1536
intermediate_size = 6144
tie_weights = True
norm_eps = 1e-5
dropout = 0.1

epochs = 6
batch_size = 256
micro_batch_size = 32  # fits 24 GB: 32; 80 GB: 256 (tools/plan.py)
learning_rate = 2.5e-4
warmup_iters = 200
weight_decay = 0.0
seq_len = 128
