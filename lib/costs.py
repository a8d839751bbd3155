"""What a step costs, by arithmetic alone: operations and memory. How near it comes: tools/plan.py.

m is a ModelConfig, cfg a TrainConfig, machine a Machine.
"""
from lib.data import validation_rows
from model import has_experts, places


def forward_flops(m, seq_len, training=False):
    """A token's, by matrix products: embeddings are free, causal attention counts half."""
    weights = m.n_layer * layer_weights(m, mlps_computed(m, seq_len, training)) + m.vocab_size * m.n_embd
    weights += sparse_layers(m) * m.n_experts * m.n_embd  # routers
    attention = m.n_layer * seq_len * m.n_embd * (1 if m.causal else 2)  # T C / 2 for QK^T, and for its V
    return 2 * (weights + attention)


def training_flops(student, teachers, seq_len, cached=False):
    """A token's: three times forward for the student, once for a teacher. From a cache only the output layers
    of teachers are computed."""
    taught = [2 * t.vocab_size * t.n_embd if cached else forward_flops(t, seq_len) for t in teachers]
    return 3 * forward_flops(student, seq_len, training=True) + sum(taught)


def layer_weights(m, mlps):
    """In a layer's matrices."""
    return (2 * m.n_embd ** 2 + 2 * m.n_embd * kv_width(m)
            + mlps * mlp_matrices(m) * m.n_embd * m.intermediate_size)


def mlps_computed(m, seq_len=1, training=False):
    """For a token in a layer, mean over the layers: experts compute all their places, taken or not."""
    if not m.n_experts:
        return 1
    computed = m.n_experts * places(m.expert_capacity if training else 0, m.n_experts, seq_len) / seq_len
    return 1 + (computed - 1) * sparse_layers(m) / m.n_layer


def sparse_layers(m):
    return sum(has_experts(m, i) for i in range(m.n_layer))


def kv_width(m):
    return m.n_embd // m.n_head * (m.n_kv_head or m.n_head)


def mlp_matrices(m):
    return 3 if m.arch == "llama" else 2


def training_bytes(cfg, machine, n, teachers=()):
    """The peak on one rank, with a student of n parameters: what torch's allocator takes from a GPU. A graph
    keeps its activations' memory, and validation comes on top; without, one follows the other."""
    rows, width = machine.micro_batch * cfg.seq_len, machine.dtype.itemsize
    model = 4 * 4 * n                                # float32: weights, gradients, AdamW's two moments
    if cfg.optimizer == "muon":
        model -= 4 * cfg.n_layer * layer_weights(cfg, mlps_computed(cfg))  # Muon has one
    several = cfg.batch_size > machine.micro_batch * machine.world or cfg.sam_rho
    if machine.graphs and several:
        model += 4 * n                               # a graph's own gradients, beside their sum
    if machine.graphs and machine.world > 1:
        model += 4 * n                               # of which the ranks' mean is taken in one piece
    if cfg.sam_rho:
        model += 4 * n                               # the weights before the climb
    chunk = min(machine.positions(cfg.loss_chunk), rows) or rows
    loss = (18 + 2 * len(teachers)) * cfg.vocab_size * chunk  # logits, their gradient, what is made of them
    validation = 18 * cfg.vocab_size * validation_rows(cfg, machine) * cfg.seq_len
    layers = rows * cfg.n_layer * layer_bytes(cfg, width, mlps_computed(cfg, cfg.seq_len, training=True))
    frozen = sum(width * t.n_layer * layer_weights(t, mlps_computed(t))
                 + (width + 4) * t.vocab_size * t.n_embd
                 + machine.graphs * rows * layer_bytes(t, width, mlps_computed(t)) for t in teachers)
    if machine.graphs:
        return model + frozen + layers + max(loss, validation)
    return model + frozen + max(layers + loss, validation)


def layer_bytes(m, width, mlps=1):
    """What a position leaves in a layer for the way back, compiled: the residual stream twice in float32; in
    the arithmetic's width both norms' outputs, q, k, v, attention's, and each product of the MLP."""
    products = 4 * m.n_embd + 2 * kv_width(m) + mlps * mlp_matrices(m) * m.intermediate_size
    masks = 2 * m.n_embd if m.dropout else 0
    return 2 * 4 * m.n_embd + width * products + masks
