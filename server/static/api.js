// Calls of the server, with its key, and errors in words for people.
const KEY = "ficoco-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export class ServerError extends Error {
  constructor(message, status, waitSeconds) {
    super(message);
    this.status = status;
    this.waitSeconds = waitSeconds;
  }
}

// JSON of `GET path`, or of `POST path` with a body. Raises ServerError, or AbortError where `signal` says so.
export async function call(path, { body, signal } = {}) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const method = body ? "POST" : "GET";
  const answer = await reach(path, { method, headers, body: body && JSON.stringify(body), signal });
  const data = await answer.json().catch((error) => {
    if (signal?.aborted) throw error;
    return null;
  });
  if (!answer.ok) throw new ServerError(reason(answer, data), answer.status, Number(answer.headers.get("Retry-After")));
  if (data === null) throw new ServerError("The response of the server was cut off. Try again.", answer.status);
  return data;
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError("The server cannot be reached. It may have stopped, or this computer is offline.", 0);
  }
}

function reason(answer, data) {
  if (answer.status === 401) return key.get() ? "The server does not accept this API key." : "";
  const detail = data?.error?.message ?? data?.error ?? data?.detail;
  return typeof detail === "string" ? detail : `The server answered with status ${answer.status}.`;
}
