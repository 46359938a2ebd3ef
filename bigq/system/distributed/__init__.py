"""distributed: what bigq takes of torch.distributed that torch calls private."""
