"""Sequence models of transformers: which run in one batch, and loss and gradient against an independent oracle.

    python tests/slow/sequence_models.py            # all; needs transformers and peft, downloads nothing
    python tests/slow/sequence_models.py bert t5    # those whose name begins with one of these words

Every model is built from a small random configuration in float64 and gets a padding mask that pads some samples. The
oracle is a plain loop: `torch.autograd.grad` of one sample's loss with ``create_graph=True``, the cosine of its views'
gradients, and autograd once more. Results go to benchmarks/results/sequence_models.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peft  # type: ignore[import-not-found,unused-ignore]
import transformers as T  # type: ignore[import-not-found,unused-ignore]
from shared.environment import environment, write_result  # type: ignore[import-not-found,unused-ignore]

from gradconsist import GradientConsistencyLoss

RESULTS = ROOT / "benchmarks" / "results" / "sequence_models.json"
WORDS, LENGTH, PAIRS, CLASSES, PAD, END = 60, 8, 3, 3, 1, 2
SIZE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "vocab_size": WORDS, "num_labels": CLASSES, "pad_token_id": PAD,
}  # fmt: skip
ONE_KEY = {"num_key_value_heads": 1}
GPT2 = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "num_labels": CLASSES,
        "pad_token_id": PAD}  # fmt: skip
BART = {
    "vocab_size": WORDS, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
    "num_labels": CLASSES, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": END, "decoder_start_token_id": END,
}  # fmt: skip
T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "num_labels": CLASSES,
      "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": 0}  # fmt: skip


def _classifier(name: str, config: dict[str, Any], **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        made = getattr(T, f"{name}Config")(**config, **more)
        model: nn.Module = getattr(T, f"{name}ForSequenceClassification")(made)
        return model

    return build


def _lora(build: Callable[[], nn.Module], *targets: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        options = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, task_type="SEQ_CLS")
        model: nn.Module = peft.get_peft_model(build(), options)
        return model

    return make


def _checkpointed(build: Callable[[], nn.Module], *, reentrant: bool) -> Callable[[], nn.Module]:
    def make() -> Any:
        model: Any = build()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model.train()

    return make


def _language_model(name: str, config: dict[str, Any]) -> Callable[[], nn.Module]:
    """A language model with its head tied to the embedding; the first three words are the classes."""
    return lambda: getattr(T, name)(
        getattr(T, f"{name[: name.index('For' if 'For' in name else 'LM')]}Config")(**config)
    )


BERT, LLAMA, GPT = _classifier("Bert", SIZE), _classifier("Llama", SIZE), _classifier("GPT2", GPT2)
MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "bert": ("encoder", BERT),
    "roberta": ("encoder", _classifier("Roberta", SIZE)),
    "xlm_roberta": ("encoder", _classifier("XLMRoberta", SIZE)),
    "electra": ("encoder", _classifier("Electra", SIZE, embedding_size=16)),
    "albert": ("encoder", _classifier("Albert", SIZE, embedding_size=16)),
    "distilbert": ("encoder", _classifier("DistilBert", {
        "vocab_size": WORDS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "num_labels": CLASSES})),
    "deberta": ("encoder", _classifier("Deberta", SIZE)),
    "deberta_v2": ("encoder", _classifier(
        "DebertaV2", SIZE, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8)),
    "mpnet": ("encoder", _classifier("MPNet", SIZE)),
    "modernbert": ("encoder", _classifier(
        "ModernBert", SIZE, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)),
    "convbert": ("encoder", _classifier("ConvBert", SIZE, embedding_size=16)),
    "funnel": ("encoder", _classifier("Funnel", {
        "vocab_size": WORDS, "block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32,
        "num_labels": CLASSES})),
    "xlnet": ("encoder", _classifier("XLNet", {
        "vocab_size": WORDS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "num_labels": CLASSES,
        "pad_token_id": PAD})),
    "gpt2": ("decoder", GPT),
    "gpt_neo": ("decoder", _classifier("GPTNeo", {
        "vocab_size": WORDS, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "num_labels": CLASSES,
        "pad_token_id": PAD})),
    "gpt_neox": ("decoder", _classifier("GPTNeoX", SIZE)),
    "opt": ("decoder", _classifier("OPT", {
        "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32,
        "max_position_embeddings": 64, "num_labels": CLASSES, "pad_token_id": PAD, "word_embed_proj_dim": 16})),
    "bloom": ("decoder", _classifier("Bloom", {
        "vocab_size": WORDS, "hidden_size": 16, "n_layer": 2, "n_head": 2, "num_labels": CLASSES,
        "pad_token_id": PAD})),
    "llama": ("decoder", LLAMA),
    "mistral": ("decoder", _classifier("Mistral", SIZE, **ONE_KEY)),
    "qwen2": ("decoder", _classifier("Qwen2", SIZE, **ONE_KEY)),
    "gemma": ("decoder", _classifier("Gemma", SIZE, head_dim=8, **ONE_KEY)),
    "gemma2": ("decoder", _classifier("Gemma2", SIZE, head_dim=8, **ONE_KEY)),
    "phi": ("decoder", _classifier("Phi", SIZE)),
    "bart": ("encoder-decoder", _classifier("Bart", BART)),
    "t5": ("encoder-decoder", _classifier("T5", T5)),
    "bert, LoRA": ("LoRA", _lora(BERT, "query", "value")),
    "llama, LoRA": ("LoRA", _lora(LLAMA, "q_proj", "v_proj")),
    "bert, checkpointed": ("checkpointing", _checkpointed(BERT, reentrant=False)),
    "bert, checkpointed (reentrant)": ("checkpointing", _checkpointed(BERT, reentrant=True)),
    "llama, checkpointed": ("checkpointing", _checkpointed(LLAMA, reentrant=False)),
    "llama, checkpointed (reentrant)": ("checkpointing", _checkpointed(LLAMA, reentrant=True)),
    "gpt2, head tied to the embedding": ("tied", _language_model("GPT2LMHeadModel", GPT2)),
    "bert, masked words, tied": ("tied", _language_model("BertForMaskedLM", SIZE)),
}  # fmt: skip


def views() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Token ids with a padding mask. Every sample ends with the end token, as T5 and BART need."""
    generator = torch.Generator().manual_seed(0)
    length = torch.tensor([LENGTH, LENGTH - 3, LENGTH])[:, None]
    place = torch.arange(LENGTH)[None]
    ids = torch.randint(5, WORDS, (PAIRS, LENGTH), generator=generator)
    noisy = torch.where(torch.rand(PAIRS, LENGTH, generator=generator) < 0.3, 4, ids)
    ended = [torch.where(place < length - 1, x, torch.where(place == length - 1, END, PAD)) for x in (ids, noisy)]
    mask = (place < length).long()
    weak, strong = ({"input_ids": x, "attention_mask": mask} for x in ended)
    return weak, strong, torch.arange(PAIRS) % CLASSES


def loss_fn(output: Any, target: Tensor) -> Tensor:
    """Cross-entropy per sample; of the first words at the first place for a language model."""
    logits = output.logits
    if logits.dim() == 3:
        logits = logits[:, 0, :CLASSES] + logits.mean((1, 2))[:, None] * torch.arange(CLASSES)
    return F.cross_entropy(logits, target, reduction="none")


def oracle(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """L_g and its gradient by definition, one sample at a time."""
    weak, strong, target = views()
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradient(view: dict[str, Tensor], i: int) -> Tensor:
        loss = loss_fn(model(**{key: x[i : i + 1] for key, x in view.items()}), target[i : i + 1]).sum()
        parts = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    terms = [1 - F.cosine_similarity(gradient(weak, i), gradient(strong, i), dim=0) for i in range(PAIRS)]
    value = torch.stack(terms).mean()
    found = torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True)
    return value.detach(), list(found)


def row(name: str) -> dict[str, Any]:
    """One model: how it runs, and its errors."""
    kind, build = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # for the oracle; the library switches dropout off itself
        for key in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if isinstance(vars(module).get(key), float):
                setattr(module, key, 0.0)
    if kind != "checkpointing":
        model.eval()
    gc = GradientConsistencyLoss(model, loss_fn=loss_fn)
    result: dict[str, Any] = {"model": name, "kind": kind}
    try:
        loss = gc(*views())
    except Exception as error:
        return {**result, "runs": "refused", "says": f"{type(error).__name__}: {error}"}
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    for module in model.modules():  # the oracle needs a graph to the parameters, which reentrant checkpoints hide
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # type: ignore[assignment]
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        value, expected = oracle(model)
    size = torch.cat([part.reshape(-1) for part in expected]).norm()
    off = torch.cat([(a - b).reshape(-1) for a, b in zip(gradient, expected, strict=True)]).norm()
    engine: Any = gc.engine.engine  # type: ignore[attr-defined]
    looped = dict(engine.looped(model)) if hasattr(engine, "looped") else {"": "the whole model"}
    runs = "one batch" if not looped else "sample by sample" if "" in looped else "parts sample by sample"
    return {
        **result, "runs": runs, "sample_by_sample": sorted(looped),
        "reasons": sorted({x[:160] for x in looped.values()}),
        "loss_error": float((loss.detach() - value).abs()), "gradient_error": float(off / size),
    }  # fmt: skip


def main() -> int:
    """Runs the models and writes their rows; 1 if some number is wrong."""
    T.logging.set_verbosity_error()
    words = sys.argv[1:]
    rows = []
    for name in MODELS:
        if words and not any(name.startswith(word) for word in words):
            continue
        start = time.perf_counter()
        rows.append(row(name))
        shown = {key: value for key, value in rows[-1].items() if key not in ("model", "kind", "sample_by_sample")}
        print(f"{name:36s} {shown} {time.perf_counter() - start:.1f} s", flush=True)
    versions = {"transformers": T.__version__, "peft": peft.__version__}
    if not words:
        write_result(RESULTS, {"environment": environment() | versions, "rows": rows})
    wrong = [each for each in rows if each.get("gradient_error", 0.0) > 1e-8 or each.get("loss_error", 0.0) > 1e-10]
    print(f"{len(rows)} models, {sum(each['runs'] == 'one batch' for each in rows)} in one batch, {len(wrong)} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
