"""Models from Hugging Face, its mirrors and ModelScope: planned, fetched, verified, published.

    hub = Hub("huggingface")
    plan = make_plan(hub, "Qwen/Qwen2.5-0.5B-Instruct")     # plan.py: files, bytes, disk
    folder = fetch(hub, plan, report=print)                 # fetch.py: goes on where it ended

`find` and `downloads` of library.py say what is there. Everything blocks: run it in a thread or a
process.
"""
