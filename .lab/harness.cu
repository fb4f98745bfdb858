// standalone: nvcc -DKERNEL='"..."' ; ./h NAME
#include KERNEL
#include <cuda.h>
#include <cuda_runtime.h>
#include <cstdio>
#include <cstdlib>
#include <cmath>
#include <vector>
#include <algorithm>
#include <string>
#define CK(x) do { cudaError_t e_ = (x); if (e_ != cudaSuccess) { printf("CUDA %s at %d: %s\n", #x, __LINE__, cudaGetErrorString(e_)); exit(1);} } while (0)
typedef CUresult (*enc_t)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
static enc_t enc;
__global__ void fill(uint16_t *x, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x*(size_t)blockDim.x+threadIdx.x; i < n; i += (size_t)gridDim.x*blockDim.x) {
    uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull; z ^= z >> 30; z *= 0xBF58476D1CE4E5B9ull; z ^= z >> 27; z *= 0x94D049BB133111EBull; z ^= z >> 31;
    float u1 = ((uint32_t)z + 1.0f) * 2.3283064e-10f, u2 = (uint32_t)(z >> 32) * 2.3283064e-10f;
    float g = sqrtf(-2.0f * logf(u1)) * cospif(2.0f * u2);
    x[i] = (uint16_t)sa::bf16::pack(g, 0.0f);
  }
}
struct Case { const char *name; int B, Hq, Hk, Nq, Nk, D, DV; long window; int pinned; int sink; int len; };
// one block per row; reference
__global__ void ref(const uint16_t *q, const uint16_t *k, const uint16_t *v, const float *sink, float *o, Case c, const int *rows) {
  int idx = rows[blockIdx.x]; int n = idx % c.Nq, h = idx / c.Nq % c.Hq, b = idx / c.Nq / c.Hq; int hk = h / (c.Hq / c.Hk);
  const uint16_t *qr = q + ((size_t)(b * c.Hq + h) * c.Nq + n) * c.D, *kb = k + (size_t)(b * c.Hk + hk) * c.Nk * c.D, *vb = v + (size_t)(b * c.Hk + hk) * c.Nk * c.DV;
  __shared__ float red[256]; __shared__ float acc[256];
  int klen = c.len > 0 ? c.len : c.Nk; long pos = n + klen - c.Nq; float sc = rsqrtf((float)c.D);
  float m = -INFINITY;
  for (int j = threadIdx.x; j < klen; j += 256) { bool vis = j <= pos && (c.window == 0 || j > pos - c.window || j < c.pinned); if (!vis) continue; float s = 0; for (int d = 0; d < c.D; d++) s += sa::bf16::wide(qr[d]) * sa::bf16::wide(kb[(size_t)j*c.D+d]); m = fmaxf(m, s * sc); }
  red[threadIdx.x] = m; __syncthreads(); for (int s = 128; s > 0; s /= 2) { if (threadIdx.x < s) red[threadIdx.x] = fmaxf(red[threadIdx.x], red[threadIdx.x+s]); __syncthreads(); } m = red[0]; __syncthreads();
  float sk = c.sink ? sink[h] : -INFINITY; m = fmaxf(m, sk);
  if (threadIdx.x < 256) acc[threadIdx.x] = 0; float sum = 0; __syncthreads();
  for (int j0 = 0; j0 < klen; j0 += 256) { int j = j0 + threadIdx.x; float w = 0; if (j < klen) { bool vis = j <= pos && (c.window == 0 || j > pos - c.window || j < c.pinned); if (vis) { float s = 0; for (int d = 0; d < c.D; d++) s += sa::bf16::wide(qr[d]) * sa::bf16::wide(kb[(size_t)j*c.D+d]); w = expf(s * sc - m); } }
    sum += w; red[threadIdx.x] = w; __syncthreads();
    if (threadIdx.x < c.DV) { float a = 0; for (int i = 0; i < 256 && j0 + i < klen; i++) if (red[i] != 0) a += red[i] * sa::bf16::wide(vb[(size_t)(j0+i)*c.DV+threadIdx.x]); acc[threadIdx.x] += a; } __syncthreads(); }
  red[threadIdx.x] = sum; __syncthreads(); for (int s = 128; s > 0; s /= 2) { if (threadIdx.x < s) red[threadIdx.x] += red[threadIdx.x+s]; __syncthreads(); }
  float tot = red[0] + (c.sink ? expf(sk - m) : 0);
  if (threadIdx.x < c.DV) o[(size_t)blockIdx.x * c.DV + threadIdx.x] = tot > 0 ? acc[threadIdx.x] / tot : 0;
}
static sa_cuda_map mapof(void *data, int64_t depth, int64_t n1, int64_t s1, int64_t n2, int64_t s2, int64_t n3, int64_t s3, int b1, int b2) {
  sa_cuda_map m; cuuint64_t dims[4] = {(cuuint64_t)depth, (cuuint64_t)n1, (cuuint64_t)n2, (cuuint64_t)n3}, st[3] = {(cuuint64_t)s1*2, (cuuint64_t)s2*2, (cuuint64_t)s3*2};
  cuuint32_t box[4] = {64, (cuuint32_t)b1, (cuuint32_t)b2, 1}, es[4] = {1,1,1,1};
  CUresult r = enc((CUtensorMap*)&m, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, data, dims, st, box, es, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r) { printf("encode failed %d\n", (int)r); exit(1); } return m;
}
template <typename F> static void *run_case(const char *label, void (*kernel)(const sa_cuda_prefill), Case c, int reps, bool poison) {
  size_t nq = (size_t)c.B*c.Hq*c.Nq*c.D, nk = (size_t)c.B*c.Hk*c.Nk*c.D, nv = (size_t)c.B*c.Hk*c.Nk*c.DV, no = (size_t)c.B*c.Hq*c.Nq*c.DV;
  uint16_t *q,*k,*v,*o; float *sink; int *dlen; CK(cudaMalloc(&q,nq*2)); CK(cudaMalloc(&k,nk*2)); CK(cudaMalloc(&v,nv*2)); CK(cudaMalloc(&o,no*2)); CK(cudaMalloc(&sink,c.Hq*4)); float *lse; CK(cudaMalloc(&lse,(size_t)c.B*c.Hq*c.Nq*4));
  fill<<<1024,256>>>(q,nq,1); fill<<<1024,256>>>(k,nk,2); fill<<<1024,256>>>(v,nv,3); std::vector<float> hs(c.Hq); for (int i=0;i<c.Hq;i++) hs[i]=(i%5)-1.5f; CK(cudaMemcpy(sink,hs.data(),c.Hq*4,cudaMemcpyHostToDevice)); CK(cudaMemset(o,0xff,no*2));
  int klen = c.len > 0 ? c.len : c.Nk; long first_pos = klen - c.Nq;
  if (poison) { long low = c.window ? std::max(0L, first_pos - c.window + 1) : 0; for (int bh = 0; bh < c.B*c.Hk; bh++) { long from = std::max<long>(c.pinned, 0); if (low > from) { CK(cudaMemset(v + ((size_t)bh*c.Nk+from)*c.DV, 0xff, (low-from)*c.DV*2)); CK(cudaMemset(k + ((size_t)bh*c.Nk+from)*c.D, 0xff, (low-from)*c.D*2)); } if (klen < c.Nk) { CK(cudaMemset(v + ((size_t)bh*c.Nk+klen)*c.DV, 0xff, (size_t)(c.Nk-klen)*c.DV*2)); CK(cudaMemset(k + ((size_t)bh*c.Nk+klen)*c.D, 0xff, (size_t)(c.Nk-klen)*c.D*2)); } } }
  static sa_cuda_prefill f; memset(&f,0,sizeof f); sa_cuda_problem &p = f.problem; int g = c.Hq/c.Hk;
  p.query={q,(int64_t)c.Hq*c.Nq*c.D,(int64_t)c.Nq*c.D,c.D}; p.key={k,(int64_t)c.Hk*c.Nk*c.D,(int64_t)c.Nk*c.D,c.D}; p.value={v,(int64_t)c.Hk*c.Nk*c.DV,(int64_t)c.Nk*c.DV,c.DV}; p.output={o,(int64_t)c.Hq*c.Nq*c.DV,(int64_t)c.Nq*c.DV,c.DV};
  p.held_key=p.key; p.held_value=p.value; p.lse=lse; p.batch=c.B; p.heads_q=c.Hq; p.heads_kv=c.Hk; p.query_length=c.Nq; p.kv_length=c.Nk; p.depth=c.D; p.depth_v=c.DV; p.logits=1; p.pinned=c.pinned; p.mass_queries=-1; p.scale=1.0f/sqrtf(c.D); p.dtype=SA_CUDA_BF16; p.causal=1;
  if (c.sink) { p.sink_logits.data=sink; p.sink_logits.given=1; p.sink_logits.stride[0]=1; p.sink_logits.type=SA_NUMBER_F32; }
  if (c.len > 0) { p.lengths.given=1; p.lengths.value=c.len; }
  if (c.window) { p.window.given=1; p.window.value=(double)c.window; p.apart=1; }
  p.common_window=c.window?c.window:SA_CUDA_NO_WINDOW; p.group=g; p.splits=1; p.lse_offset=-1; p.rotated_offset=-1; p.aligned=1;
  const int tokens = F::rows/g, rows = tokens*g; p.row_tiles=((int64_t)c.Nq*g+rows-1)/rows;
#ifndef V1
  f.query=mapof(q,c.D,c.Hq,p.query.head,c.Nq,p.query.token,c.B,p.query.batch,g,tokens);
  f.key=mapof(k,c.D,c.Nk,p.key.token,c.Hk,p.key.head,c.B,p.key.batch,F::keys,1); f.value=mapof(v,c.DV,c.Nk,p.value.token,c.Hk,p.value.head,c.B,p.value.batch,F::keys,1);
  f.few_keys=mapof(k,c.D,c.Nk,p.key.token,c.Hk,p.key.head,c.B,p.key.batch,SA_HOPPER_FEW,1); f.few_values=mapof(v,c.DV,c.Nk,p.value.token,c.Hk,p.value.head,c.B,p.value.batch,SA_HOPPER_FEW,1);
#endif
  int sms; CK(cudaDeviceGetAttribute(&sms,cudaDevAttrMultiProcessorCount,0)); long units=p.row_tiles*c.Hk*c.B; int grid=(int)std::min<long>(units,sms);
  size_t shared=F::total(); CK(cudaFuncSetAttribute((const void*)kernel,cudaFuncAttributeMaxDynamicSharedMemorySize,(int)shared));
  kernel<<<grid,F::threads,shared>>>(f); CK(cudaGetLastError()); CK(cudaDeviceSynchronize());
  // check
  std::vector<int> rowsv; size_t total=(size_t)c.B*c.Hq*c.Nq; size_t want=reps?256:4096; for (size_t i=0;i<want && i<total;i++) rowsv.push_back((int)(total<=want?i:(i*2654435761ull+ i*i*40503ull)%total)); if (reps) { rowsv.push_back(0); rowsv.push_back((int)total-1);} 
  int *dr; CK(cudaMalloc(&dr,rowsv.size()*4)); CK(cudaMemcpy(dr,rowsv.data(),rowsv.size()*4,cudaMemcpyHostToDevice)); float *ro; CK(cudaMalloc(&ro,rowsv.size()*c.DV*4));
  if (poison) { fill<<<1024,256>>>(k,nk,2); fill<<<1024,256>>>(v,nv,3); }
  ref<<<(int)rowsv.size(),256>>>(q,k,v,sink,ro,c,dr); CK(cudaDeviceSynchronize());
  std::vector<float> hr(rowsv.size()*c.DV); CK(cudaMemcpy(hr.data(),ro,hr.size()*4,cudaMemcpyDeviceToHost)); std::vector<uint16_t> ho(no); CK(cudaMemcpy(ho.data(),o,no*2,cudaMemcpyDeviceToHost));
  double worst=0; long bad=0; std::string first; 
  for (size_t i=0;i<rowsv.size();i++) { double rw=0; for (int d=0;d<c.DV;d++) { uint32_t bits=(uint32_t)ho[(size_t)rowsv[i]*c.DV+d]<<16; float x; memcpy(&x,&bits,4); double e=fabs(x-hr[i*c.DV+d]); double tol=0.01*fabs(hr[i*c.DV+d])+0.01; if (!(e<=tol)) { bad++; if (first.size()<300) { char t[160]; snprintf(t,160,"[h%d n%d d%d got %g want %g] ",rowsv[i]/c.Nq%c.Hq,rowsv[i]%c.Nq,d,x,hr[i*c.DV+d]); first+=t; } } if (e>worst||e!=e) worst=e; } }
  float ms=0; if (reps) { cudaEvent_t a,b; cudaEventCreate(&a); cudaEventCreate(&b); std::vector<float> t; for (int i=0;i<reps;i++) { cudaEventRecord(a); kernel<<<grid,F::threads,shared>>>(f); cudaEventRecord(b); CK(cudaEventSynchronize(b)); float x; cudaEventElapsedTime(&x,a,b); t.push_back(x);} std::sort(t.begin(),t.end()); ms=t[t.size()/2]; }
  double pairs=0; for (int n=0;n<c.Nq;n++) { long pos=n+klen-c.Nq; if (pos<0) continue; long w=c.window?std::min<long>(pos+1,c.window):pos+1; long pn=std::min<long>(c.pinned,std::max<long>(0,pos+1-w)); pairs+=w+pn; } double fl=2.0*(c.D+c.DV)*pairs*c.Hq*c.B;
  printf("%-26s %-18s %8.3f ms %6.1f TF  err %.4f bad %ld %s\n",label,c.name,ms,ms?fl/ms*1e-9:0,worst,bad,first.c_str()); fflush(stdout);
  cudaFree(q);cudaFree(k);cudaFree(v);cudaFree(o);cudaFree(sink);cudaFree(lse);cudaFree(dr);cudaFree(ro); (void)dlen; return 0; }
int main(int argc, char **argv) {
  cudaDriverEntryPointQueryResult st; CK(cudaFree(0)); CK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled",(void**)&enc,12000,cudaEnableDefault,&st));
  const char *label=argv[1]; bool check=argc>2&&argv[2][0]=='c'; const char *only = argc>3?argv[3]:"";
#ifndef SA_ONLY_64
  using F1=H<SA_FORM_128>; 
  const int D=128;
#define KN prefill_hopper_bf16_128
  Case perf[]={{"dense8k",1,64,8,8192,8192,D,D,0,0,0,0},{"dense32k",1,64,8,32768,32768,D,D,0,0,0,0},{"w1024+4s 32k",1,64,8,32768,32768,D,D,1024,4,1,0},{"w4096+4 32/8 32k",1,32,8,32768,32768,D,D,4096,4,0,0},{"dense2k",1,64,8,2048,2048,D,D,0,0,0,0}};
#else
  using F1=H64<SA_FORM_64>; const int D=64;
#define KN prefill_hopper_bf16_64
  Case perf[]={{"dense16k d64",1,64,8,16384,16384,D,D,0,0,0,0},{"w1024+4s B2 32k d64",2,64,8,32768,32768,D,D,1024,4,1,0}};
#endif
  Case small[]={{"plain",2,8,2,700,700,D,D,0,0,0,0},{"g7",1,14,2,900,900,D,D,0,0,1,0},{"mha q<k",1,4,4,300,1111,D,D,0,0,0,0},{"win512+4",1,16,2,1500,1500,D,D,512,4,1,0},{"win200 p20",1,8,2,1000,1000,D,D,200,20,0,0},{"win256 p4 q<k",1,8,1,333,1400,D,D,256,4,0,0},{"win1024 g4 p16",1,8,2,3000,3000,D,D,1024,16,1,0},{"len",1,8,1,500,1000,D,D,0,0,0,777},{"len<q",1,8,1,500,1000,D,D,300,3,1,300},{"win128 mha p1",1,4,4,999,999,D,D,128,1,0,0}};
  if (check) for (auto &c: small) { run_case<F1>(label,KN,c,0,true); }
  else for (auto &c: perf) if (!*only || strstr(c.name,only)) run_case<F1>(label,KN,c,c.Nq>20000&&!c.window?5:9,false);
  return 0; }
