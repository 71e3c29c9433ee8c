"""Tries which architectures of transformers can be split, by exporting tiny models with random weights.

    python tests/benchmarks/architectures.py [NAME ...]

Covers the architectures that the tests export (``tests/checkpoints.py``) and others of transformers' sequence
classifiers. The exported files must answer every sample text, alone and in a batch with the others, as the checkpoint
answers it alone. A refusal must be one of patcher's own errors. Prints a table and writes ``architectures.json`` under
``--out``; fails if files answer differently, or if anything but a refusal is raised.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoints  # noqa: E402  found through sys.path above

from export import run_export  # noqa: E402
from export.tokenizer import SAMPLE_TEXTS  # noqa: E402
from patcher.errors import PatcherError  # noqa: E402
from patcher.runtime import Encoder, open_session, run_head  # noqa: E402

_NARROW = {"embedding_size": 16}
_POSITIONS = {"max_position_embeddings": 80}
_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, **_POSITIONS}
_ROBERTA = {**_ENCODER, "pad_token_id": 1}
_DECODER = {**_ROBERTA, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 2}
_XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, **_POSITIONS}
_OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, **_POSITIONS}
_OPT |= {"word_embed_proj_dim": 32, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
_GPT_NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8, "pad_token_id": 1, **_POSITIONS}
_GPT_NEO |= {"attention_types": [[["global", "local"], 1]]}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, **_POSITIONS}
_REFORMER = {"hidden_size": 32, "num_attention_heads": 4, "attention_head_size": 8, "feed_forward_size": 64}
_REFORMER |= {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "num_buckets": 4, "pad_token_id": 1}
_REFORMER |= {"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, **_POSITIONS}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}

# Class prefix, settings, and the architecture whose kind of tokenizer it gets (tests/checkpoints.py).
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bart": ("Bart", _BART, "roberta"),
    "bigbird, block-sparse": ("BigBird", _ENCODER, "bert"),
    "bigbird, full attention": ("BigBird", {**_ENCODER, "attention_type": "original_full"}, "bert"),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 1}, "qwen2"),
    "camembert": ("Camembert", _ROBERTA, "roberta"),
    "canine": ("Canine", _ENCODER, "bert"),
    "convbert": ("ConvBert", {**_ENCODER, **_NARROW}, "bert"),
    "data2vec-text": ("Data2VecText", _ROBERTA, "roberta"),
    "deberta": ("Deberta", {**_ENCODER, **_DEBERTA}, "bert"),
    "ernie": ("Ernie", _ENCODER, "bert"),
    "esm": ("Esm", {**_ROBERTA, "mask_token_id": 4, "position_embedding_type": "rotary"}, "roberta"),
    "flaubert": ("Flaubert", _XLM, "distilbert"),
    "fnet": ("FNet", _ENCODER, "distilbert"),
    "funnel": ("Funnel", {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]}, "bert"),
    "gemma": ("Gemma", {**_DECODER, "head_dim": 8}, "qwen2"),
    "gemma2": ("Gemma2", {**_DECODER, "head_dim": 8, "sliding_window": 8}, "qwen2"),
    "gemma3": ("Gemma3Text", {**_DECODER, "head_dim": 8, "sliding_window": 8}, "qwen2"),
    "gpt-neo": ("GPTNeo", _GPT_NEO, "qwen2"),
    "gpt-neox": ("GPTNeoX", _ROBERTA, "qwen2"),
    "ibert": ("IBert", _ROBERTA, "roberta"),
    "layoutlm": ("LayoutLM", _ENCODER, "bert"),
    "longformer": ("Longformer", {**_ROBERTA, "attention_window": 8}, "roberta"),
    "luke": ("Luke", {**_ROBERTA, "entity_vocab_size": 5, "entity_emb_size": 8}, "roberta"),
    "megatron-bert": ("MegatronBert", _ENCODER, "bert"),
    "mistral": ("Mistral", {**_DECODER, "sliding_window": 8}, "qwen2"),
    "mixtral": ("Mixtral", {**_DECODER, "num_local_experts": 2, "num_experts_per_tok": 1}, "qwen2"),
    "mobilebert": ("MobileBert", {**_ENCODER, **_NARROW, "intra_bottleneck_size": 16, "true_hidden_size": 16}, "bert"),
    "mra": ("Mra", _ENCODER, "bert"),
    "nystromformer": ("Nystromformer", {**_ENCODER, "num_landmarks": 4, "segment_means_seq_len": 4}, "bert"),
    "opt": ("OPT", _OPT, "qwen2"),
    "phi3": ("Phi3", _DECODER, "qwen2"),
    "reformer": ("Reformer", _REFORMER, "roberta"),
    "rembert": ("RemBert", {**_ENCODER, "input_embedding_size": 16, "output_embedding_size": 16}, "bert"),
    "roberta-prelayernorm": ("RobertaPreLayerNorm", _ROBERTA, "roberta"),
    "roformer": ("RoFormer", {**_ENCODER, "embedding_size": 32}, "bert"),
    "squeezebert": ("SqueezeBert", {**_ENCODER, "embedding_size": 32}, "bert"),
    "t5": ("T5", {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64, "pad_token_id": 1}, "roberta"),
    "xlm": ("XLM", _XLM, "distilbert"),
    "xmod": ("Xmod", {**_ROBERTA, "languages": ["en_XX"], "default_language": "en_XX"}, "roberta"),
    "yoso": ("Yoso", _ENCODER, "bert"),
}
_CLOSE = 1e-4


def tried(name: str, folder: Path) -> dict[str, Any]:
    """Export one architecture; return its last layer and the largest difference in a logit, or why it was refused."""
    checkpoints.save_checkpoint(folder / "checkpoint", name)
    try:
        report = run_export(folder / "checkpoint", folder / "repository")
    except PatcherError as error:
        return {"refused": str(error).replace(f"{folder}/", ""), "broken": False}
    except Exception as error:  # noqa: BLE001  any other exception is what this script looks for
        return {"refused": f"{type(error).__name__}: {error}", "broken": True}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "checkpoint").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "checkpoint")
    with torch.no_grad():
        expected = np.concatenate([model(**tokenizer([t], **_CUT)).logits.numpy() for t in SAMPLE_TEXTS])
    classifier = report.repository.classifier()
    encoder = Encoder(classifier.backbone_path, classifier.tokenizer_path, threads=1)
    head = open_session(classifier.version_path(1) / "model.onnx", threads=1)
    alone = np.concatenate([run_head(head, encoder.encode([text])).logits for text in SAMPLE_TEXTS])
    together = run_head(head, encoder.encode(SAMPLE_TEXTS)).logits
    difference = float(max(np.abs(alone - expected).max(), np.abs(together - expected).max()))
    return {"layer": report.layer, "difference": difference, "broken": difference > _CLOSE}


_CUT: dict[str, Any] = {"return_tensors": "pt", "truncation": True}


def main() -> int:
    """Try all architectures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures to try; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "build")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    checkpoints.ARCHITECTURES.update({name: (*settings, "") for name, settings in OTHERS.items()})
    results = {}
    for name in arguments.names or sorted(checkpoints.ARCHITECTURES):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = found = tried(name, Path(folder))
        said = found.get("refused") or f"{found['layer']}: logits within {found['difference']:.1g}"
        print(f"{name:24} {'WRONG ' if found['broken'] else ''}{said}", flush=True)
    exported = sum("layer" in found for found in results.values())
    print(f"{exported} of {len(results)} exported, {len(results) - exported} refused")
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"transformers": transformers.__version__, "architectures": results}, indent=1, sort_keys=True)
    (arguments.out / "architectures.json").write_text(text + "\n")
    return int(any(found["broken"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
