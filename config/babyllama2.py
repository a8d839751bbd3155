# BabyLlama-2 (BabyLM 2024; Table 3): 345,355,200 parameters from two teachers of its own size.
#   torchrun --nproc_per_node=4 distill.py config/babyllama2.py --seed=3
# after config/babyllama2_teacher.py, where the data is described.
data_dir = "data/babylm_95"
out_dir = "out/babyllama2"

arch = "llama"
n_layer = 32
n_head = 15
n_kv_head = 5
n_embd = 960
intermediate_size = 2560

epochs = 8
batch_size = 128
micro_batch_size = 32  # fits 24 GB: 64; 80 GB: 128 (tools/plan.py)
learning_rate = 7e-4
warmup_iters = 600
weight_decay = 5.0
seq_len = 128

teachers = ["out/babyllama2_teacher1", "out/babyllama2_teacher2"]
alpha = 0.5
temperature = 1.0
kl_reduction = "sequence"  # the published code's; 'token' is the equation as it reads
