"""Bugs that only a device beside the CPU shows, found by tests/gpu on the simulated one."""

from __future__ import annotations

from mutants.bug import Bug

ON = "../gpu/test_simulated.py::test_on_the_simulated_gpu[training]"

BUGS = [
    Bug(
        "weights made on the CPU",
        "a tensor that is made is made on the device of its inputs",
        ON,
        "_inputs/pairs.py",
        "return torch.ones(target.shape[0], device=target.device)",
        "return torch.ones(target.shape[0])",
    ),
    Bug(
        "the subset drawn with a generator of another device",
        "a draw takes place on the device of its generator",
        ON,
        "_inputs/chosen_pairs.py",
        "generator=generator, device=generator.device)",
        "generator=generator, device=index.device)",
    ),
    Bug(
        "a read for every parameter",
        "the number of reads of a step does not grow with the model",
        ON,
        "_consistency/gradient_buffer.py",
        "if part is None:",
        "if part is None or part.sum().item() is None:",
    ),
    Bug(
        "a collective on a CPU tensor",
        "a group of CUDA devices gets CUDA tensors",
        ON,
        "methods/processes.py",
        "torch.tensor([len(rows)], device=rows.device)",
        "torch.tensor([len(rows)])",
    ),
    Bug(
        "the mask moved to the host and back",
        "what is on the device stays there",
        ON,
        "methods/fixmatch.py",
        "(confidence >= self.threshold).to(weak.dtype)",
        "(confidence >= self.threshold).cpu().to(weak.device, weak.dtype)",
    ),
]
