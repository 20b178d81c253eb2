"""Models that are folded in tests, with values of every kind, and what they compute."""

import torch


def filled(model, seed=0):
    """With statistics, scales and shifts that are no ones and zeros; in evaluation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.2, 3, generator=generator)
                if module.weight is not None:
                    module.weight.normal_(generator=generator)
                    module.bias.normal_(generator=generator)
    return model.eval()


def images(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=generator).to(dtype)


def output(model, x):
    with torch.no_grad():
        return model(x)
