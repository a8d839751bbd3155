# Temperature against the weight of CE, on what `make demo` left in demo/. About a minute a run on one CPU
# core.
#   make demo && python -m tools.study config/demo/grid.py --seeds=1,2,3
runs = [
    f"T{t}-alpha{int(100 * a)} config/demo/student.py --temperature={t} --alpha={a} demo/gpt2 demo/llama"
    for t in (1, 2, 4) for a in (0, 0.25, 0.5, 0.75)]
settings = ["config/demo/demo.py"]
data_dir = "demo/data"
out_dir = "demo/grid"
blimp = ["demo/pairs"]
