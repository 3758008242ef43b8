"""The backend of vLLM: its engine computes in a process of its own, where rows are reduced before they travel.

May import: models, protocols and below, vllm. What runs inside the engine is `processor.py`; the rest must not assume that it
shares memory with it. To follow a change of vLLM: `loading.py` probes the engine at its start and names what has moved.
"""
