import torch, time, statistics as st
from torch.nn.attention import sdpa_kernel, SDPBackend
def run(name, B,Hq,Hk,N,D):
    q=torch.randn(B,Hq,N,D,device='cuda',dtype=torch.bfloat16); k=torch.randn(B,Hk,N,D,device='cuda',dtype=torch.bfloat16); v=torch.randn_like(k)
    f=lambda: torch.nn.functional.scaled_dot_product_attention(q,k,v,is_causal=True,enable_gqa=True)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        f(); f(); torch.cuda.synchronize(); t=[]
        for _ in range(7):
            a=torch.cuda.Event(enable_timing=True); b=torch.cuda.Event(enable_timing=True); a.record(); f(); b.record(); b.synchronize(); t.append(a.elapsed_time(b))
    ms=st.median(t); print("%-26s %-18s %8.3f ms %6.1f TF"%("cudnn",name,ms,2*B*Hq*N*(N+1)*D/ms*1e-9),flush=True)
run("dense8k",1,64,8,8192,128); run("dense32k",1,64,8,32768,128); run("dense16k d64",1,64,8,16384,64); run("dense2k",1,64,8,2048,128)
