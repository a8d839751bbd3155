# Plain and distilled students on real text over seeds, as far as two CPU cores get in half an hour: 300
# steps of 8 x 128 tokens each, one teacher.
#   python train.py config/llama_16m.py config/cpu.py --max_iters=700 --out_dir=out/llama_16m
#   python -m tools.study config/study/cpu.py --seeds=1,2,3
runs = [
    "plain config/llama_12m.py config/cpu.py",
    "distilled config/llama_12m.py config/cpu.py --temperature=1 out/llama_16m",
]
settings = ["--max_iters=300", "--eval_interval=150", "--eval_chunks=512"]
out_dir = "out/cpu_study"
