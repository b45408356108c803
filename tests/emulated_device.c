/* A device for TensorFlow (a "pluggable device") that counts what is copied to it and from it.
 *
 * Its memory is the host's, but TensorFlow does not know that, and brings there and back whatever
 * it would bring to a GPU. Its streams are threads, in which copies and kernels wait for their
 * turn, as on a GPU. It has the kernels that TensorFlow has for every device (branches, loops,
 * variables), and one of its own: L2Loss. */

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/experimental/stream_executor/stream_executor.h"
#include "tensorflow/c/kernels.h"
#include "tensorflow/c/tf_tensor.h"

/* -- what is counted: copies of 1000 bytes and more; losses and numbers are less ---------------- */

static pthread_mutex_t counting = PTHREAD_MUTEX_INITIALIZER;
static int copies[2];

static void count(int to_host, uint64_t size) {
  pthread_mutex_lock(&counting);
  copies[to_host] += size >= 1000;
  pthread_mutex_unlock(&counting);
}

int copied(int to_host, int forget) {
  pthread_mutex_lock(&counting);
  int number = copies[to_host];
  if (forget) copies[to_host] = 0;
  pthread_mutex_unlock(&counting);
  return number;
}

/* -- streams: what is put there is done in turn, in a thread ------------------------------------ */

struct task {
  enum { COPY, FILL, WAIT, CALL, L2_LOSS } what;
  void* to;
  const void* from;
  uint64_t size;
  int pattern;
  SP_Stream other; /* WAIT until so many of its tasks are done */
  uint64_t tasks;
  SE_StatusCallbackFn call;
  void* argument;
  struct task* next;
};

struct SP_Stream_st {
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t moved;
  struct task *first, *last;
  uint64_t given, done;
  int ends;
};

struct SP_Event_st {
  SP_Stream stream;
  uint64_t tasks;
};

static void wait_for(SP_Stream stream, uint64_t tasks) {
  pthread_mutex_lock(&stream->lock);
  while (stream->done < tasks) pthread_cond_wait(&stream->moved, &stream->lock);
  pthread_mutex_unlock(&stream->lock);
}

static uint64_t given(SP_Stream stream) {
  pthread_mutex_lock(&stream->lock);
  uint64_t tasks = stream->given;
  pthread_mutex_unlock(&stream->lock);
  return tasks;
}

static void perform(struct task* task) {
  switch (task->what) {
    case COPY:
      memcpy(task->to, task->from, task->size);
      break;
    case FILL:
      memset(task->to, task->pattern, task->size);
      break;
    case WAIT:
      wait_for(task->other, task->tasks);
      break;
    case CALL: {
      TF_Status* status = TF_NewStatus();
      task->call(task->argument, status);
      TF_DeleteStatus(status);
      break;
    }
    case L2_LOSS: {
      const float* values = task->from;
      double sum = 0;
      for (uint64_t i = 0; i < task->size / sizeof(float); ++i) sum += values[i] * values[i];
      *(float*)task->to = (float)(sum / 2);
    }
  }
}

static void* run_stream(void* argument) {
  SP_Stream stream = argument;
  pthread_mutex_lock(&stream->lock);
  for (;;) {
    while (!stream->first && !stream->ends) pthread_cond_wait(&stream->moved, &stream->lock);
    struct task* task = stream->first;
    if (!task) break;
    stream->first = task->next;
    if (!stream->first) stream->last = NULL;
    pthread_mutex_unlock(&stream->lock);
    perform(task);
    free(task);
    pthread_mutex_lock(&stream->lock);
    stream->done++;
    pthread_cond_broadcast(&stream->moved);
  }
  pthread_mutex_unlock(&stream->lock);
  return NULL;
}

static void put(SP_Stream stream, struct task given) {
  struct task* task = malloc(sizeof(*task));
  *task = given;
  pthread_mutex_lock(&stream->lock);
  if (stream->last)
    stream->last->next = task;
  else
    stream->first = task;
  stream->last = task;
  stream->given++;
  pthread_cond_broadcast(&stream->moved);
  pthread_mutex_unlock(&stream->lock);
}

static void create_stream(const SP_Device* device, SP_Stream* created, TF_Status* status) {
  SP_Stream stream = calloc(1, sizeof(*stream));
  pthread_mutex_init(&stream->lock, NULL);
  pthread_cond_init(&stream->moved, NULL);
  pthread_create(&stream->thread, NULL, run_stream, stream);
  *created = stream;
}

/* Its memory stays: an event may still ask it. */
static void destroy_stream(const SP_Device* device, SP_Stream stream) {
  pthread_mutex_lock(&stream->lock);
  stream->ends = 1;
  pthread_cond_broadcast(&stream->moved);
  pthread_mutex_unlock(&stream->lock);
  pthread_join(stream->thread, NULL);
}

static void follow(const SP_Device* device, SP_Stream stream, SP_Stream other, TF_Status* status) {
  put(stream, (struct task){.what = WAIT, .other = other, .tasks = given(other)});
}

static void stream_status(const SP_Device* device, SP_Stream stream, TF_Status* status) {}

static void finish(const SP_Device* device, SP_Stream stream, TF_Status* status) {
  wait_for(stream, given(stream));
}

static void finish_all(const SP_Device* device, TF_Status* status) {}

static TF_Bool call_host(const SP_Device* device, SP_Stream stream, SE_StatusCallbackFn call,
                         void* argument) {
  put(stream, (struct task){.what = CALL, .call = call, .argument = argument});
  return 1;
}

/* -- events --------------------------------------------------------------------------------- */

static void create_event(const SP_Device* device, SP_Event* event, TF_Status* status) {
  *event = calloc(1, sizeof(**event));
}

static void destroy_event(const SP_Device* device, SP_Event event) { free(event); }

static SE_EventStatus event_status(const SP_Device* device, SP_Event event) {
  if (!event->stream) return SE_EVENT_COMPLETE;
  pthread_mutex_lock(&event->stream->lock);
  int done = event->stream->done >= event->tasks;
  pthread_mutex_unlock(&event->stream->lock);
  return done ? SE_EVENT_COMPLETE : SE_EVENT_PENDING;
}

static void record_event(const SP_Device* device, SP_Stream stream, SP_Event event,
                         TF_Status* status) {
  event->stream = stream;
  event->tasks = given(stream);
}

static void stream_waits(const SP_Device* const device, SP_Stream stream, SP_Event event,
                         TF_Status* const status) {
  if (event->stream)
    put(stream, (struct task){.what = WAIT, .other = event->stream, .tasks = event->tasks});
}

static void host_waits(const SP_Device* device, SP_Event event, TF_Status* status) {
  if (event->stream) wait_for(event->stream, event->tasks);
}

/* -- timers, which nobody reads ------------------------------------------------------------- */

static void create_timer(const SP_Device* device, SP_Timer* timer, TF_Status* status) {
  *timer = NULL;
}
static void destroy_timer(const SP_Device* device, SP_Timer timer) {}
static void use_timer(const SP_Device* device, SP_Stream stream, SP_Timer timer,
                      TF_Status* status) {}
static uint64_t nanoseconds(SP_Timer timer) { return 0; }

/* -- memory --------------------------------------------------------------------------------- */

static void* memory(uint64_t size) {
  void* at = NULL;
  return posix_memalign(&at, 256, size ? size : 1) ? NULL : at;
}

static void allocate(const SP_Device* device, uint64_t size, int64_t space,
                     SP_DeviceMemoryBase* at) {
  at->struct_size = SP_DEVICE_MEMORY_BASE_STRUCT_SIZE;
  at->opaque = memory(size);
  at->size = size;
}

static void deallocate(const SP_Device* device, SP_DeviceMemoryBase* at) {
  free(at->opaque);
  at->opaque = NULL;
  at->size = 0;
}

static void* host_allocate(const SP_Device* device, uint64_t size) { return memory(size); }
static void host_deallocate(const SP_Device* device, void* at) { free(at); }
static TF_Bool no_stats(const SP_Device* device, SP_AllocatorStats* stats) { return 0; }

static TF_Bool usage(const SP_Device* device, int64_t* left, int64_t* total) {
  *left = *total = (int64_t)1 << 33;
  return 1;
}

static void to_host(const SP_Device* device, SP_Stream stream, void* to,
                    const SP_DeviceMemoryBase* from, uint64_t size, TF_Status* status) {
  count(1, size);
  put(stream, (struct task){.what = COPY, .to = to, .from = from->opaque, .size = size});
}

static void to_device(const SP_Device* device, SP_Stream stream, SP_DeviceMemoryBase* to,
                      const void* from, uint64_t size, TF_Status* status) {
  count(0, size);
  put(stream, (struct task){.what = COPY, .to = to->opaque, .from = from, .size = size});
}

static void within(const SP_Device* device, SP_Stream stream, SP_DeviceMemoryBase* to,
                   const SP_DeviceMemoryBase* from, uint64_t size, TF_Status* status) {
  put(stream, (struct task){.what = COPY, .to = to->opaque, .from = from->opaque, .size = size});
}

static void to_host_now(const SP_Device* device, void* to, const SP_DeviceMemoryBase* from,
                        uint64_t size, TF_Status* status) {
  count(1, size);
  memcpy(to, from->opaque, size);
}

static void to_device_now(const SP_Device* device, SP_DeviceMemoryBase* to, const void* from,
                          uint64_t size, TF_Status* status) {
  count(0, size);
  memcpy(to->opaque, from, size);
}

static void within_now(const SP_Device* device, SP_DeviceMemoryBase* to,
                       const SP_DeviceMemoryBase* from, uint64_t size, TF_Status* status) {
  memcpy(to->opaque, from->opaque, size);
}

static void fill(const SP_Device* device, SP_Stream stream, SP_DeviceMemoryBase* at,
                 uint8_t pattern, uint64_t size, TF_Status* status) {
  put(stream, (struct task){.what = FILL, .to = at->opaque, .pattern = pattern, .size = size});
}

static void zero(const SP_Device* device, SP_Stream stream, SP_DeviceMemoryBase* at, uint64_t size,
                 TF_Status* status) {
  fill(device, stream, at, 0, size, status);
}

/* TensorFlow fills with zeros only. */
static void fill32(const SP_Device* device, SP_Stream stream, SP_DeviceMemoryBase* at,
                   uint32_t pattern, uint64_t size, TF_Status* status) {
  fill(device, stream, at, (uint8_t)pattern, size, status);
}

/* -- the platform --------------------------------------------------------------------------- */

static void device_count(const SP_Platform* platform, int* number, TF_Status* status) {
  *number = 1;
}

static void create_device(const SP_Platform* platform, SE_CreateDeviceParams* params,
                          TF_Status* status) {
  params->device->struct_size = SP_DEVICE_STRUCT_SIZE;
  params->device->ordinal = params->ordinal;
}
static void destroy_device(const SP_Platform* platform, SP_Device* device) {}

static void create_device_fns(const SP_Platform* platform, SE_CreateDeviceFnsParams* params,
                              TF_Status* status) {
  params->device_fns->struct_size = SP_DEVICE_FNS_STRUCT_SIZE;
}
static void destroy_device_fns(const SP_Platform* platform, SP_DeviceFns* fns) {}

static void create_executor(const SP_Platform* platform, SE_CreateStreamExecutorParams* params,
                            TF_Status* status) {
  *params->stream_executor = (SP_StreamExecutor){
      .struct_size = SP_STREAMEXECUTOR_STRUCT_SIZE,
      .allocate = allocate,
      .deallocate = deallocate,
      .host_memory_allocate = host_allocate,
      .host_memory_deallocate = host_deallocate,
      .get_allocator_stats = no_stats,
      .device_memory_usage = usage,
      .create_stream = create_stream,
      .destroy_stream = destroy_stream,
      .create_stream_dependency = follow,
      .get_stream_status = stream_status,
      .create_event = create_event,
      .destroy_event = destroy_event,
      .get_event_status = event_status,
      .record_event = record_event,
      .wait_for_event = stream_waits,
      .create_timer = create_timer,
      .destroy_timer = destroy_timer,
      .start_timer = use_timer,
      .stop_timer = use_timer,
      .memcpy_dtoh = to_host,
      .memcpy_htod = to_device,
      .memcpy_dtod = within,
      .sync_memcpy_dtoh = to_host_now,
      .sync_memcpy_htod = to_device_now,
      .sync_memcpy_dtod = within_now,
      .block_host_for_event = host_waits,
      .block_host_until_done = finish,
      .synchronize_all_activity = finish_all,
      .mem_zero = zero,
      .memset = fill,
      .memset32 = fill32,
      .host_callback = call_host,
  };
}
static void destroy_executor(const SP_Platform* platform, SP_StreamExecutor* executor) {}

static void create_timer_fns(const SP_Platform* platform, SP_TimerFns* fns, TF_Status* status) {
  fns->struct_size = SP_TIMER_FNS_STRUCT_SIZE;
  fns->nanoseconds = nanoseconds;
}
static void destroy_timer_fns(const SP_Platform* platform, SP_TimerFns* fns) {}
static void destroy_platform(SP_Platform* platform) {}
static void destroy_platform_fns(SP_PlatformFns* fns) {}

void SE_InitPlugin(SE_PlatformRegistrationParams* params, TF_Status* status) {
  params->platform->struct_size = SP_PLATFORM_STRUCT_SIZE;
  params->platform->name = "THREADS";
  params->platform->type = "EMULATED";
  params->platform->use_bfc_allocator = 1;
  params->platform->force_memory_growth = 1;
  *params->platform_fns = (SP_PlatformFns){
      .struct_size = SP_PLATFORM_FNS_STRUCT_SIZE,
      .get_device_count = device_count,
      .create_device = create_device,
      .destroy_device = destroy_device,
      .create_device_fns = create_device_fns,
      .destroy_device_fns = destroy_device_fns,
      .create_stream_executor = create_executor,
      .destroy_stream_executor = destroy_executor,
      .create_timer_fns = create_timer_fns,
      .destroy_timer_fns = destroy_timer_fns,
  };
  params->destroy_platform = destroy_platform;
  params->destroy_platform_fns = destroy_platform_fns;
}

/* -- the kernel: half the sum of squares ---------------------------------------------------- */

static void* make_kernel(TF_OpKernelConstruction* construction) { return NULL; }
static void destroy_kernel(void* kernel) {}

static void compute(void* kernel, TF_OpKernelContext* context) {
  TF_Status* status = TF_NewStatus();
  TF_Tensor* input = NULL;
  TF_GetInput(context, 0, &input, status);
  TF_Tensor* output = TF_AllocateOutput(context, 0, TF_FLOAT, NULL, 0, sizeof(float), status);
  SP_Stream stream = TF_GetStream(context, status);
  if (TF_GetCode(status) == TF_OK)
    put(stream, (struct task){.what = L2_LOSS,
                              .to = TF_TensorData(output),
                              .from = TF_TensorData(input),
                              .size = TF_TensorByteSize(input)});
  else
    TF_OpKernelContext_Failure(context, status);
  TF_DeleteTensor(input);
  TF_DeleteTensor(output);
  TF_DeleteStatus(status);
}

void TF_InitKernel(void) {
  TF_Status* status = TF_NewStatus();
  TF_KernelBuilder* builder =
      TF_NewKernelBuilder("L2Loss", "EMULATED", make_kernel, compute, destroy_kernel);
  TF_KernelBuilder_TypeConstraint(builder, "T", TF_FLOAT, status);
  TF_RegisterKernelBuilder("L2Loss", builder, status);
  TF_DeleteStatus(status);
}
