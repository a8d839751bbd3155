# DistilledGPT-44M (Teaching Tiny Minds, section 4.2 and Table 3): GPT2-44M from GPT2-44M and Llama-60M, with
# Baby Llama's recipe. The paper: all told 3 hours on one A5000.
#   python train.py config/tinyminds_gpt2_44m.py
#   python train.py config/tinyminds_llama_60m.py
#   python distill.py config/distilledgpt_44m.py
# Table 4 (a mean over nine tasks, without CoLA) and the paper's test over tasks, once both are scored and
# fine-tuned with config/glue/lora.py:
#   python -m tools.compare out/distilledgpt_44m+out/glue out/babyllama+out/glue_babyllama \
#       --tasks=mrpc,rte,multirc,qqp,qnli,wsc,mnli,sst2,boolq
out_dir = "out/distilledgpt_44m"

arch = "gpt2"
n_layer = 2
n_head = 8
n_embd = 768
intermediate_size = 3072
tie_weights = True
norm_eps = 1e-5

epochs = 6
batch_size = 32
learning_rate = 3e-4
warmup_iters = 200
weight_decay = 0.1
seq_len = 128

teachers = ["out/tinyminds_gpt2_44m", "out/tinyminds_llama_60m"]
alpha = 0.5
temperature = 2.0
kl_reduction = "sequence"  # the published code's; 'token' is the equation as it reads
