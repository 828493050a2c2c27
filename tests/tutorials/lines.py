"""Every command line of the five tutorials, word for word, and what stands for it here.

The translation is mechanical: `python app.py` for `lmdeploy`, `python` and `python3`. What cannot
be so has `instead`, and `why`. `more` is put behind a line, so that it takes seconds: few and short
calibration texts, a threshold that a model of random weights passes, the CPU, one process. Servers
listen on loopback and a free port.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

CALIBRATED = "--calib-samples 4 --calib-seqlen 64 --device cpu"
JUDGED = "--eval-tokens 512 --threshold 100 --device cpu"
QUANTIZED = f"{CALIBRATED} {JUDGED}"
INLINE = "--inline --device cpu --kv-cache-tokens 2048 --max-tokens 8"
SERVED = "--inline --device cpu --kv-cache-tokens 2048"


@dataclass(frozen=True)
class Line:
    """One command of a tutorial.

    Attributes:
        at: its line in the tutorial.
        text: as it stands there.
        more: see above.
        instead: the words that stand for it, if they are others.
        why: they are.
    """

    at: int
    text: str
    more: str = ""
    instead: str = ""
    why: str = ""

    def words(self, names: dict[str, str]) -> list[str]:
        """The command line for app.py, with `names` put in for paths and variables."""
        # Behind "\", tutorials have blanks and comments, which a shell would not take.
        text = re.sub(r"\\[ \t]*(#[^\n]*)?(\n|$)", " ", self.instead or self.text)
        for old, new in names.items():
            text = text.replace(old, new)
        words = shlex.split(text, comments=True)
        if not self.instead:
            assert words.pop(0) in ("lmdeploy", "python", "python3")
        return [*words, *shlex.split(self.more)]


OVERWRITE = "convert refuses to take the place of a workspace that is there, unless told"
EDIT = "the tutorial edits the file by hand"
FETCH = "git-lfs is not needed: downloads are a command"

EMOLLM = (
    Line(199, "lmdeploy chat turbomind internlm/internlm-chat-20b-4bit --model-name "
         "internlm-chat-20b", INLINE),
    Line(200, "lmdeploy chat turbomind Qwen/Qwen-7B-Chat --model-name qwen-7b", INLINE),
    Line(205, "lmdeploy chat turbomind /EmoLLM --model-name internlm2-chat-7b", INLINE),
    Line(214, "lmdeploy convert internlm2-chat-7b /EmoLLM"),
    Line(225, "lmdeploy chat turbomind ./workspace", INLINE),
    Line(232, "lmdeploy serve api_server ./workspace --server-name 0.0.0.0 --server-port "
         "${server_port} --tp 1", SERVED),
    Line(252, """lmdeploy lite calibrate \\
--model /EmoLLM \\
--calib_dataset "c4" \\
--calib_samples 128 \\
--calib_seqlen 2048 \\
--work_dir ./quant_output""", CALIBRATED),
    Line(275, """lmdeploy lite kv_qparams \\
--work_dir ./quant_output \\
--turbomind_dir workspace/triton_models/weights/ \\
--kv_sym False \\
--num_tp 1""", JUDGED),
    Line(282, "quant_policy -> 4", instead="config set ./workspace quant_policy=4", why=EDIT),
    Line(283, "use_context_fmha -> 0", instead="config set ./workspace use_context_fmha=0",
         why=EDIT),
    Line(295, """lmdeploy lite auto_awq \\
--model /EmoLLM \\
--w_bits 4 \\
--w_group_size 128 \\
--work_dir ./quant_output""", JUDGED),
    Line(305, """lmdeploy convert internlm2-chat-7b ./quant_output \\
--model-format awq \\
--group-size 128""", "--overwrite", why=OVERWRITE),
    Line(311, """lmdeploy convert internlm2-chat-7b ./quant_output \\
--model-format awq \\
--group-size 128 \\
--dst_path ./workspace_quant"""),
)  # fmt: skip

API_SERVER = """lmdeploy serve api_server ./workspace \\
 --server_name 0.0.0.0 \\
 --server_port 23333 \\
 --instance_num 64 \\
 --tp 1"""
PAGE_OVER_SERVER = """lmdeploy serve gradio http://0.0.0.0:23333 \\
 --server_name 0.0.0.0 \\
 --server_port 6006 \\
 --restful_api True"""

HANDS_ON = (
    Line(271, "lmdeploy convert internlm-chat-7b  /root/share/temp/model_repos/internlm-chat-7b/"),
    Line(288, API_SERVER, SERVED),  # as in line 81
    Line(303, "lmdeploy serve api_client http://localhost:23333", "--max-tokens 8"),
    Line(314, """{
  "model": "internlm-chat-7b",
  "messages": "写一首春天的诗",
  "temperature": 0.7,
  "top_p": 1,
  "n": 1,
  "max_tokens": 512,
  "stop": false,
  "stream": false,
  "presence_penalty": 0,
  "frequency_penalty": 0,
  "user": "string",
  "repetition_penalty": 1,
  "renew_session": false,
  "ignore_eos": false
}"""),
    Line(347, PAGE_OVER_SERVER),
    Line(373, """lmdeploy lite calibrate \\
  $HF_MODEL \\
  --calib-dataset 'ptb' \\            # 校准数据集，支持 c4, ptb, wikitext2, pileval
  --calib-samples 128 \\              # 校准集的样本数，如果显存不够，可以适当调小
  --calib-seqlen 2048 \\              # 单条的文本长度，如果显存不够，可以适当调小
  --work-dir $WORK_DIR \\             # 保存 Pytorch 格式量化统计参数和量化后权重的文件夹
""", CALIBRATED),
    Line(397, """lmdeploy lite kv_qparams \\
  $WORK_DIR  \\                                        # 上一步的结果
  workspace/triton_models/weights/ \\                  # 保存量化参数的目录，推理要用
  --num-tp 1  \\                                       # Tensor 并行使用的 GPU 数
""", JUDGED),
    Line(407, "也可以先把 turbomind_dir 设成私有目录，再把缩放系数拷贝进 workspace",
         instead="lite kv_qparams $WORK_DIR ./private --num-tp 1",
         why="the tutorial says it in words; the private folder is there, and empty"),
    Line(411, "quant_policy -> 4", instead="config set ./workspace quant_policy=4", why=EDIT),
    Line(413, "use_context_fmha -> 0", instead="config set ./workspace use_context_fmha=0",
         why=EDIT),
    Line(417, "lmdeploy chat turbomind ./workspace", INLINE),
    Line(421, "max_batch_size", instead="config set ./workspace max_batch_size=16", why=EDIT),
    Line(422, "bin/llama_triton_example", instead="benchmark profile_generation ./workspace "
         "--concurrency 1 2 --completion-tokens 8 --rounds 1 --inline --kv-cache-tokens 2048",
         why="a C++ program of TurboMind's, to see memory by batch size"),
    Line(455, "lmdeploy lite smooth_quant internlm/internlm-chat-7b --work-dir "
         "./internlm-chat-7b-w8", QUANTIZED),
    Line(471, """lmdeploy lite auto_awq \\
   $HF_MODEL \\                       # Model name or path
  --calib-dataset 'ptb' \\            # Calibration dataset
  --calib-samples 128 \\              # Number of samples in the calibration set
  --calib-seqlen 2048 \\              # Length of a single piece of text
  --w-bits 4 \\                       # Bit number for weight quantization
  --w-group-size 128 \\               # Group size for weight quantization statistics
  --work-dir $WORK_DIR               # Folder storing Pytorch format quantization statistics
""", QUANTIZED),
    Line(481, """lmdeploy lite auto_awq \\
  --model  /root/share/temp/model_repos/internlm-chat-7b/ \\
  --w_bits 4 \\
  --w_group_size 128 \\
  --work_dir ./quant_output""", QUANTIZED),
    Line(488, "lmdeploy lite auto_awq internlm/ianternlm-chat-7b --work-dir internlm-chat-7b-4bit",
         QUANTIZED),
    Line(497, """lmdeploy convert  internlm-chat-7b ./quant_output \\
    --model-format awq \\
    --group-size 128""", "--overwrite", why=OVERWRITE),
    Line(505, """lmdeploy convert  internlm-chat-7b ./quant_output \\
    --model-format awq \\
    --group-size 128 \\
    --dst_path ./workspace_quant"""),
    Line(513, "lmdeploy chat torch ./internlm-chat-7b-w8", INLINE),
    Line(517, "lmdeploy serve gradio ./internlm-chat-7b-4bit --server-name {ip_addr} "
         "--server-port {port}", SERVED),
)  # fmt: skip

JETSON = (
    Line(52, "snapshot_download('Shanghai_AI_Laboratory/internlm-chat-7b', "
         "cache_dir='internlm-chat-7b')",
         instead="download Shanghai_AI_Laboratory/internlm-chat-7b --source modelscope --endpoint "
         "$HUB --local-dir internlm-chat-7b/Shanghai_AI_Laboratory/internlm-chat-7b",
         why="download_models.py, a program of the modelscope package (61 runs it)"),
    Line(76, """lmdeploy lite auto_awq \\
   $HF_MODEL \\
  --calib-dataset 'ptb' \\
  --calib-samples 128 \\
  --calib-seqlen 2048 \\
  --w-bits 4 \\
  --w-group-size 128 \\
  --work-dir $WORK_DIR""", QUANTIZED),
    Line(91, """lmdeploy convert  internlm-chat-7b \\
    $WORK_DIR \\
    --model-format awq \\
    --group-size 128 \\
    --dst-path $TM_DIR"""),
    Line(101, "cache_max_entry_count = 0.5; cache_block_seq_len = 128; cache_chunk_size = 1",
         instead="config set $TM_DIR cache_max_entry_count=0.5 cache_block_seq_len=128 "
         "cache_chunk_size=1", why=EDIT),
)  # fmt: skip

W4A16 = (
    Line(19, "git clone https://huggingface.co/lmdeploy/llama2-chat-7b-w4",
         instead="download lmdeploy/llama2-chat-7b-w4 --local-dir ./llama2-chat-7b-w4", why=FETCH),
    Line(27, """python3 -m lmdeploy.serve.turbomind.deploy \\
    --model-name llama2 \\
    --model-path ./llama2-chat-7b-w4 \\
    --model-format awq \\
    --group-size 128"""),
    Line(34, "python3 -m lmdeploy.turbomind.chat ./workspace", INLINE),
    Line(42, "python3 -m lmdeploy.serve.turbomind ./workspace --server_name {ip_addr} "
         "----server_port {port}", SERVED),
    Line(64, """python benchmark/profile_generation.py \\
  ./workspace \\
  --concurrency 1 --input_seqlen 1 --output_seqlen 512""",
         "--completion-tokens 8 --rounds 1 --inline --kv-cache-tokens 2048"),
    Line(79, """python3 -m lmdeploy.lite.apis.calibrate \\
  --model $HF_MODEL \\
  --calib_dataset 'c4' \\             # 校准数据集，支持 c4, ptb, wikitext2, pileval
  --calib_samples 128 \\              # 校准集的样本数，如果显存不够，可以适当调小
  --calib_seqlen 2048 \\              # 单条的文本长度，如果显存不够，可以适当调小
  --work_dir $WORK_DIR \\             # 保存 Pytorch 格式量化统计参数和量化后权重的文件夹
""", CALIBRATED),
    Line(92, """python3 -m lmdeploy.lite.apis.auto_awq \\
  --model $HF_MODEL \\
  --w_bits 4 \\                       # 权重量化的 bit 数
  --w_group_size 128 \\               # 权重量化分组统计尺寸
  --work_dir $WORK_DIR \\             # 步骤 1 保存量化参数的目录
""", JUDGED),
)  # fmt: skip

WORKSHOP = (
    Line(49, "lmdeploy convert internlm-chat-7b  /root/share/temp/model_repos/internlm-chat-7b/"),
    Line(56, "lmdeploy chat turbomind ./workspace", INLINE),
    Line(67, API_SERVER, SERVED),
    Line(73, "lmdeploy serve api_client http://localhost:23333", "--max-tokens 8"),
    Line(83, PAGE_OVER_SERVER),
    Line(88, "lmdeploy serve gradio ./workspace", f"{SERVED} --server-port 0"),
    Line(94, '''from lmdeploy import turbomind as tm

# load model
model_path = "/root/share/temp/model_repos/internlm-chat-7b/"
tm_model = tm.TurboMind.from_pretrained(model_path, model_name='internlm-chat-20b')
generator = tm_model.create_instance()

# process query
query = "你好啊兄嘚"
prompt = tm_model.model.get_prompt(query)
input_ids = tm_model.tokenizer.encode(prompt)

# inference
for outputs in generator.stream_infer(
        session_id=0,
        input_ids=[input_ids]):
    res, tokens = outputs[0]

response = tm_model.tokenizer.decode(res.tolist())
print(response)
'''),
    Line(124, """lmdeploy lite calibrate \\
  --model  /root/share/temp/model_repos/internlm-chat-7b/ \\
  --calib_dataset "c4" \\
  --calib_samples 128 \\
  --calib_seqlen 2048 \\
  --work_dir ./quant_output""", CALIBRATED),
    Line(131, "第二步：获取量化参数", instead="lite kv_qparams ./quant_output ./workspace "
         f"{JUDGED}", why="the tutorial shows the formulas of the command only"),
    Line(137, "修改 weights/config.ini 文件", instead="config set ./workspace quant_policy=4",
         why=EDIT),
    Line(144, """lmdeploy lite auto_awq \\
  --model  /root/share/temp/model_repos/internlm-chat-7b/ \\
  --w_bits 4 \\
  --w_group_size 128 \\
  --work_dir ./quant_output """, JUDGED),
    Line(152, """lmdeploy convert  internlm-chat-7b ./quant_output \\
    --model-format awq \\
    --group-size 128
""", "--overwrite", why=OVERWRITE),
)  # fmt: skip

TUTORIALS = {
    "emollm-deployment": EMOLLM,
    "hands-on-notes": HANDS_ON,
    "server-quantization-for-jetson": JETSON,
    "w4a16-deployment": W4A16,
    "workshop-notes": WORKSHOP,
}
# Lines that are no command of LMDeploy's: (tutorial, line, first words, why nothing is instead).
INSTALLS = "installs LMDeploy or what it needs; here: make run"
SHELL = "a command of the shell's own, as it is"
EXCEPTED = (
    ("emollm-deployment", 167, "pip install packaging", INSTALLS),
    ("emollm-deployment", 169, "pip install flash_attn", INSTALLS),
    ("emollm-deployment", 173, "pip install 'lmdeploy[all]==v0.1.0'", INSTALLS),
    ("emollm-deployment", 181, "pip install --upgrade lmdeploy", INSTALLS),
    ("emollm-deployment", 262, "cp calib_dataloader.py", "c4 is not needed: text is bundled"),
    ("emollm-deployment", 263, "cp -r c4", "c4 is not needed: text is bundled"),
    ("hands-on-notes", 252, "conda create", INSTALLS),
    ("hands-on-notes", 253, "install_conda_env_internlm_base.sh", INSTALLS),
    ("hands-on-notes", 258, "pip install packaging", INSTALLS),
    ("hands-on-notes", 260, "pip install flash_attn", INSTALLS),
    ("hands-on-notes", 262, "pip install 'lmdeploy[all]==v0.1.0'", INSTALLS),
    ("hands-on-notes", 308, "ssh -CNg -L 23333", SHELL),
    ("hands-on-notes", 355, "ssh -CNg -L 6006", SHELL),
    ("hands-on-notes", 430, "pip install lmdeploy", INSTALLS),
    ("hands-on-notes", 431, "pip install triton>=2.1.0", INSTALLS),
    ("hands-on-notes", 441, "git-lfs install", FETCH),
    ("hands-on-notes", 442, "git clone internlm-chat-7b-w8 (coming soon)", "it never came"),
    ("server-quantization-for-jetson", 12, "conda create", INSTALLS),
    ("server-quantization-for-jetson", 18, "conda activate", INSTALLS),
    ("server-quantization-for-jetson", 28, "pip install torch", INSTALLS),
    ("server-quantization-for-jetson", 30, "pip install lmdeploy", INSTALLS),
    ("server-quantization-for-jetson", 39, "mkdir -p ~/models && cd ~/models", SHELL),
    ("server-quantization-for-jetson", 45, "pip install modelscope", INSTALLS),
    ("server-quantization-for-jetson", 61, "python download_models.py", "see 52"),
    ("server-quantization-for-jetson", 73, "export HF_MODEL, WORK_DIR, TM_DIR", SHELL),
    ("server-quantization-for-jetson", 109, "apt-get install pigz", SHELL),
    ("server-quantization-for-jetson", 110, "tar --use-compress-program=pigz", SHELL),
    ("w4a16-deployment", 8, "pip install lmdeploy", INSTALLS),
    ("w4a16-deployment", 18, "git-lfs install", FETCH),
    ("workshop-notes", 37, "install_conda_env_internlm_base.sh", INSTALLS),
    ("workshop-notes", 38, "conda activate", INSTALLS),
    ("workshop-notes", 44, "pip install 'lmdeploy[all]==v0.1.0'", INSTALLS),
)
