# BabyLlama-2 (BabyLM 2024; Table 3): 345,355,200 parameters from two teachers of its own size.
#   torchrun --nproc_per_node=4 distill.py config/babyllama2.py --seed=3
# after config/babyllama2_teacher.py, where the data is described. Its table 3 and figure 1, of runs that are
# also fine-tuned with config/glue/babyllama2.py:
#   python -m tools.compare out/babyllama2+out/glue out/babyllama2_teacher1+out/glue_teacher1
#   python -m tools.plot --violin=out/a_1+out/a_2+out/glue_a_1+out/glue_a_2,out/b_1+out/glue_b_1
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
