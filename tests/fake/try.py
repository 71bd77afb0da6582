"""The first thing that must work with the fakes preloaded: tensors of a device and back."""

import torch

t = torch.empty(4, device="cuda")
t.copy_(torch.arange(4.0))
assert t.cpu().tolist() == [0.0, 1.0, 2.0, 3.0]
u = torch.empty(4, device="cuda:1")
u.copy_(t)
assert u.cpu().tolist() == [0.0, 1.0, 2.0, 3.0]
try:
    u + 1
except RuntimeError as error:
    print("refused:", error)
print(torch.cuda.get_device_name(), torch.cuda.device_count())
