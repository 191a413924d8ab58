"""What a report says beyond the facts: the spec as a person reads it, and what would help a site left alone."""

import re
from dataclasses import replace

from torch import Tensor

from attnopt.passes.site import Operand
from attnopt.report import SiteReport
from attnopt.rule import Site
from attnopt.spec import AttentionSpec

#: Part of a reason -> what to do. The first that is found counts; an empty one says that there is nothing to do.
_ADVICE = (
    (r"quarantined", "please report it with the model's lines; the original computes the site"),
    (r"differs? .*from the graph|read it differently", "please report it: attnopt misread the site and noticed"),
    (r"written to in place|in-place", "write the result to a new tensor instead"),
    (
        r"^an inner value .*(returned|used)",
        "do not return or reuse what lies inside (output_attentions=False), or compute it apart",
    ),
    (r"used outside", "return the last state only, or compute what is needed outside apart"),
    (r"dropout", "call model.eval(), or set the dropout of the attention to 0"),
    (r"depends? on (data|sizes)", "give it a fixed size, or pass the number as a plain Python float"),
    (r"no_grad|detach|gradient of its own", "let gradients flow through the whole attention, or through none of it"),
    (r"different devices", "move q, k, v and the mask to one device"),
    (r"memory layout", "put .contiguous() behind the attention"),
    (r"delta rule|its own gate|selective|no kernel", ""),
    (r"not linear in|decides by data", "nothing: it is neither softmax nor linear attention, and stays as it is"),
    (r"does not sum over what the softmax normalised", "leave out what mixes the weights (talking heads), or leave it"),
    (
        r"^the weights are (multiplied|masked) by .*along the keys|not made of a mask",
        "to hide keys, fill their scores with -inf before the softmax: what is only multiplied by 0 still weighs",
    ),
    (
        r"column is joined|concatenated from several parts|columns are joined",
        "concatenate the keys before Q K^T, and the values, instead of the scores",
    ),
    (r"value is not known", "fill with a Python number, such as float('-inf')"),
    (r"does not honour|is not served|kernel is allowed", "allow more kernels, or leave it: the site is understood"),
)  # fmt: skip
_INSTEAD = {
    "softmax": "spell the step plainly, or call torch.nn.functional.scaled_dot_product_attention here, "
    "if that computes the same; if it does not, leave the site as it is",
    "linear": "spell the step plainly, or call attnopt.ops.lightning_attention here, "
    "if that computes the same; if it does not, leave the site as it is",
}


def spec_text(site: Site, spec: AttentionSpec) -> str:
    """The spec in one line; a scale that is no number in the graph shows as what it is."""
    q = site.operands.get("q")
    factors = q.times if isinstance(q, Operand) else ()
    if not factors:
        return str(spec)
    kinds = ("tensor" if isinstance(f.node.meta.get("val"), Tensor) else "input" for f in factors)
    names = "".join(f"{'/' if f.inverse else '*'}{kind}" for f, kind in zip(factors, kinds, strict=True))
    number = "" if spec.scale == 1 and not factors[0].inverse else f"{spec.scale:.6g}"
    return re.sub(r"scale=\S+", f"scale={number}{names if number else names[1:]}", str(spec), count=1)


def advised(site: SiteReport) -> SiteReport:
    """The report of a site with what would help, where it was left alone and its reason does not say it already."""
    if site.verdict not in ("refused", "quarantined") or site.advice:
        return site
    for pattern, advice in _ADVICE:
        if re.search(pattern, site.reason):
            return replace(site, advice=advice)
    says_so = "; " in site.reason
    return replace(site, advice="" if says_so or site.spec else _INSTEAD.get(site.family, ""))
