# Self- and reverse-distillation (Nair et al.): nine models, each taught by the three before it, from 58M
# (58,343,936 parameters) over 95M (95,371,008) up to 360M (359,973,888), all with one recipe.
#   python -m tools.study config/study/reverse_distillation.py --nproc_per_node=4
# 58-0 is Baby Llama. Whether 58-2 has one teacher or two the paper leaves open: two here, take one away for
# one. Teachers of 360M are held in int8, as in the paper. Its figure 2, table 5 and figure 5; figure 3 once
# each is fine-tuned with config/glue/reverse.py:
#   python -m tools.plot --curves=$(echo out/reverse/{58,95,360}-{0,1,2} | tr ' ' ,) --out=figure_2
#   python -m tools.compare out/reverse/{58,95,360}-{0,1,2} --widest=15
#   python -m tools.plot --phenomena=$(echo out/reverse/{58,95,360}-{0,1,2} | tr ' ' ,) --widest=15
#   python -m tools.plot --tasks=$(echo out/glue_{58,95,360}-{0,1,2} | tr ' ' ,) --accuracy --out=figure_3
runs = [
    "58-0 config/llama_58m.py out/gpt2_705m out/llama_360m",
    "58-1 config/llama_58m.py 58-0",
    "58-2 config/llama_58m.py 58-0 58-1",
    "95-0 config/llama_95m.py 58-0 58-1 58-2",
    "95-1 config/llama_95m.py 58-1 58-2 95-0",
    "95-2 config/llama_95m.py 58-2 95-0 95-1",
    "360-0 config/llama_360m.py 95-0 95-1 95-2",
    "360-1 config/llama_360m.py --teacher_dtype=float32,float32,int8 95-1 95-2 360-0",
    "360-2 config/llama_360m.py --teacher_dtype=float32,int8,int8 95-2 360-0 360-1",
]
settings = [
    "--epochs=10", "--batch_size=64", "--micro_batch_size=0", "--seq_len=128",
    "--learning_rate=2.5e-4", "--warmup_iters=200", "--weight_decay=0",
    "--alpha=0.5", "--temperature=2.0",
    "--kl_reduction=sequence",  # the published code's; 'token' is the equation as it reads
]
out_dir = "out/reverse"
blimp = ["blimp_filtered", "supplement_filtered"]
