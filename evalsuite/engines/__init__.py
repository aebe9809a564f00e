"""What turns windows into log-probabilities. Only concrete engines import torch."""
